"""Reading the manifests of infra/ray, and holding them against the schemas of what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

HERE = Path(__file__).parent
RAY = HERE.parent.parent / "infra/ray"
KUBERNETES = "1.34"
KUBERAY = json.loads((HERE / "kuberay.schema.json").read_text())


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RAY / name).read_text()))


def only(name: str, kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents(name) if document["kind"] == kind)
    return found


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod templates of a CronJob, a StatefulSet, a RayJob or a RayService."""
    spec = document.get("spec", {})
    if document["kind"] == "CronJob":
        yield spec["jobTemplate"]["spec"]["template"]
    if document["kind"] == "StatefulSet":
        yield spec["template"]
    if document["kind"] == "RayJob":
        yield spec["submitterPodTemplate"]
    cluster = spec.get("rayClusterSpec", spec.get("rayClusterConfig"))
    if cluster is not None:
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster["workerGroupSpecs"])


def validate(document: dict[str, Any]) -> None:
    """Raises for a field that is unknown, missing or of the wrong type."""
    if document["apiVersion"] == "ray.io/v1":
        jsonschema.validate(document, KUBERAY | {"$ref": f"#/$defs/{document['kind']}"})
        for pod in pods(document):
            template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod}
            kubernetes_validate.validate(template, KUBERNETES, strict=True)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def assert_needs_few_rights(pod: dict[str, Any]) -> None:
    """No root, no capabilities, no writable root file system; memory that is asked for and limited alike; no stray volume."""
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["metadata"]["labels"]["app"].startswith("triform-")
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def mounted(pod: dict[str, Any]) -> list[set[str]]:
    return [{mount["name"] for mount in container["volumeMounts"]} for container in pod["spec"]["containers"]]


def namespace(name: str) -> dict[str, Any]:
    """All the pods of a namespace, as a peer of a NetworkPolicy."""
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def tcp(*ports: int) -> list[dict[str, Any]]:
    """Those ports, as a NetworkPolicy has them."""
    return [{"port": port, "protocol": "TCP"} for port in ports]
