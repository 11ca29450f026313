"""The Serve form's manifests of infra/ray/serving, against the schemas of what reads them, and against Ray and `build_app`."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from ray_apps.environment import TUNED, draining_seconds, serve_environment
from ray_apps.predict import build_app
from tests.infra.manifests import RAY, assert_needs_few_rights, documents, mounted, namespace, only, pods, tcp, validate
from tests.infra.test_image import layers
from triform.settings import Settings

MANIFESTS = ("serving/access.yaml", "serving/redis.yaml", "serving/rayservice.yaml")
DOCUMENTS = [pytest.param(one, id=f"{name}-{one['kind']}-{i}") for name in MANIFESTS for i, one in enumerate(documents(name))]
SERVICE = only("serving/rayservice.yaml", "RayService")
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
GROUPS = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
HEAD, *WORKERS = pods(SERVICE)
CONFIG = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
(REDIS,) = pods(only("serving/redis.yaml", "StatefulSet"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_manifest_fits_its_schema(document: dict[str, Any]) -> None:
    validate(document)


@pytest.mark.parametrize(
    "path",
    [
        "spec",
        "spec.upgradeStrategy",
        "spec.upgradeStrategy.clusterUpgradeOptions",
        "spec.rayClusterConfig",
        "spec.rayClusterConfig.gcsFaultToleranceOptions",
        "spec.rayClusterConfig.autoscalerOptions",
        "spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.livenessProbe",
        "spec.rayClusterConfig.workerGroupSpecs.2",
    ],
)
def test_a_misspelt_field_would_be_found(path: str) -> None:
    document = json.loads(json.dumps(SERVICE))  # a copy without YAML's shared nodes
    target: Any = document
    for step in path.split("."):
        target = target[int(step) if step.isdecimal() else step]
    target["maxSurgePercnt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxSurgePercnt"):
        validate(document)


def test_kustomize_finds_its_files() -> None:
    (made,) = documents("serving/kustomization.yaml")
    assert sorted(f"serving/{name}" for name in made["resources"]) == sorted(MANIFESTS)


@pytest.mark.parametrize("pod", [HEAD, *WORKERS, REDIS])
def test_a_pod_has_no_more_rights_than_it_needs(pod: dict[str, Any]) -> None:
    assert_needs_few_rights(pod)
    written = {volume["name"] for volume in pod["spec"].get("volumes", [])} or {"data"}
    assert mounted(pod) == [written]


def test_no_manifest_uses_merge_keys() -> None:
    """Not every reader of YAML knows `<<`."""
    assert not any("<<:" in (RAY / name).read_text() for name in MANIFESTS)


def test_the_upgrade_is_what_kuberay_takes() -> None:
    """KubeRay's ValidateClusterUpgradeOptions: an autoscaler, a gateway class, steps within the surge's bounds."""
    strategy = SERVICE["spec"]["upgradeStrategy"]
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    assert CLUSTER["enableInTreeAutoscaling"] is True
    assert strategy["clusterUpgradeOptions"]["gatewayClassName"]
    (app,) = CONFIG["applications"]
    assert SERVICE["spec"]["rayClusterDeletionDelaySeconds"] > app["args"]["drain_s"]


def test_ray_starts_with_the_settings_that_make_serve_fast() -> None:
    settings = {}
    for pod in [HEAD, *WORKERS]:
        (container,) = pod["spec"]["containers"]
        settings = {entry["name"]: entry["value"] for entry in container["env"]}
        assert settings.items() >= TUNED.items()
    script = RAY.parent.parent / Path(settings["RAY_SERVE_HAPROXY_BINARY_PATH"]).relative_to("/opt/triform")
    assert os.access(script, os.X_OK)  # copied into the image as it is here
    ours = Settings.from_env({name: value for name, value in settings.items() if name.startswith("TRIFORM_")})
    assert ours.repository == "s3://example-models/online"
    kept = {ours.cache, ours.engine_cache}
    folders = {mount["mountPath"] for mount in HEAD["spec"]["containers"][0]["volumeMounts"]}
    assert all(any(Path(str(folder)).is_relative_to(mount) for mount in folders) for folder in kept)
    assert not ours.allow_anonymous
    assert ours.api_keys_file is not None
    keys = Path(ours.api_keys_file).parent
    for pod in [HEAD, *WORKERS]:
        (mount,) = [one for one in pod["spec"]["containers"][0]["volumeMounts"] if one["mountPath"] == str(keys)]
        (volume,) = [one for one in pod["spec"]["volumes"] if one["name"] == mount["name"]]
        assert (mount["readOnly"], volume["secret"]["defaultMode"] & 0o027) == (True, 0)  # which is what `triform doctor` wants
    assert CLUSTER["rayVersion"] == version("ray")


def test_ray_and_build_app_read_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIFORM_REPOSITORY", "models")
    monkeypatch.setenv("TRIFORM_API_KEYS_FILE", "keys.json")
    read = ServeDeploySchema.model_validate(CONFIG)
    assert read.model_dump(exclude_unset=True, mode="json") == CONFIG
    (app,) = read.applications
    options = build_app(app.args)._bound_deployment.ray_actor_options
    wanted = [name for name, group in GROUPS.items() if group["minReplicas"] > 0]
    limits = GROUPS[wanted[0]]["template"]["spec"]["containers"][0]["resources"]["limits"]
    replicas = int(int(limits["cpu"]) / options["num_cpus"])
    assert app.args["autoscaling"]["min_replicas"] <= replicas * GROUPS[wanted[0]]["minReplicas"]
    assert app.args["autoscaling"]["max_replicas"] == replicas * GROUPS[wanted[0]]["maxReplicas"]


def test_a_pod_that_must_go_has_the_time_for_what_is_in_flight() -> None:
    """Before SIGTERM its place in the Service; then Serve's draining period and `drain_s`; then the kill."""
    (app,) = CONFIG["applications"]
    for pod in WORKERS:
        (container,) = pod["spec"]["containers"]
        settings = {entry["name"]: entry["value"] for entry in container["env"]}
        drain = float(settings["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drain > draining_seconds(settings) + app["args"]["drain_s"]
        first = float(container["lifecycle"]["preStop"]["exec"]["command"][-1].removeprefix("sleep "))
        assert pod["spec"]["terminationGracePeriodSeconds"] > first + drain


def test_kuberay_is_not_asked_for_a_service_that_it_would_not_make() -> None:
    """With incremental upgrades BuildServeService passes over spec.serveService; its own Service has the head's port `serve`."""
    assert SERVICE["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    assert "serveService" not in SERVICE["spec"]
    (app,) = CONFIG["applications"]
    assert SERVICE["spec"]["excludeHeadPodFromServeSvc"] is True
    assert app["args"]["autoscaling"]["min_replicas"] > 0  # with none the head alone has a proxy, and nobody could ask for one
    (container,) = HEAD["spec"]["containers"]
    assert {"name": "serve", "containerPort": CONFIG["http_options"]["port"]} in container["ports"]
    assert only("serving/access.yaml", "Service")["spec"]["selector"]["ray.io/node-type"] == "worker"  # as in excludeHeadPod...


def test_rays_object_store_fits_in_shared_memory() -> None:
    """Else Ray puts it on the disk at /tmp, and warns."""
    for group in [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]:
        (shm,) = [one["emptyDir"] for one in group["template"]["spec"]["volumes"] if one["name"] == "shm"]
        assert shm == {"medium": "Memory", "sizeLimit": "1Gi"}
        assert 0 < int(group["rayStartParams"]["object-store-memory"]) <= 0.9 * (1 << 30)


def test_clients_find_the_ports_that_serve_listens_at() -> None:
    ports = {"serve": CONFIG["http_options"]["port"], "grpc": CONFIG["grpc_options"]["port"]}
    service = only("serving/access.yaml", "Service")["spec"]
    assert {port["name"]: port["targetPort"] for port in service["ports"]} == ports
    for pod in WORKERS:
        assert {**pod["metadata"]["labels"], "ray.io/node-type": "worker"}.items() >= service["selector"].items()
        (container,) = pod["spec"]["containers"]
        named = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert named.items() >= ports.items()
        (readiness,) = [container["readinessProbe"]["exec"]["command"][-1]]
        assert f"localhost:{ports['serve']}/-/healthz" in readiness


def test_only_the_clusters_own_pods_reach_replicas_and_haproxys_pages() -> None:
    """As a whole: an Egress alone, a range of ports or an empty selector would open what is closed."""
    policies = {p["metadata"]["name"]: p["spec"] for p in documents("serving/access.yaml") if p["kind"] == "NetworkPolicy"}
    assert all(pod["metadata"]["labels"] == {"app": "triform-serve"} for pod in [HEAD, *WORKERS])
    own = {"podSelector": {"matchLabels": {"app": "triform-serve"}}}
    environment = serve_environment(Path("/tmp"))
    metrics, stats = (int(environment[f"RAY_SERVE_HAPROXY_{name}_PORT"]) for name in ("METRICS", "STATS"))
    gateway = {"podSelector": {"matchExpressions": [{"key": "gateway.networking.k8s.io/gateway-name", "operator": "Exists"}]}}
    clients = {"namespaceSelector": {"matchLabels": {"triform-serve-clients": "allowed"}}}
    prometheus = {**namespace("monitoring"), "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}
    assert policies["triform-serve"] == own | {
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [own]},
            {"from": [namespace("kuberay-operator")], "ports": tcp(8265, CONFIG["http_options"]["port"])},
            {"from": [gateway, clients], "ports": tcp(CONFIG["http_options"]["port"], CONFIG["grpc_options"]["port"])},
            {"from": [prometheus], "ports": tcp(8080, 44217, metrics)},
        ],
    }
    assert not {stats, 8500, 9500} & {8265, 8000, 9000, 8080, 44217, metrics}
    assert policies["triform-redis"] == {
        "podSelector": {"matchLabels": REDIS["metadata"]["labels"]},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [own], "ports": tcp(6379)}],
    }


@pytest.mark.parametrize("pod", [HEAD, *WORKERS])
def test_ray_is_asked_whether_it_has_started_lives_and_is_ready(pod: dict[str, Any]) -> None:
    """The raylet of every pod; of the head its memory as well, of a worker HAProxy."""
    (container,) = pod["spec"]["containers"]
    asked = {name: container[f"{name}Probe"]["exec"]["command"][-1] for name in ("startup", "liveness", "readiness")}
    raylet, memory, haproxy = ":52365/api/local_raylet_healthz", ":8265/api/gcs_healthz", ":8000/-/healthz"
    wanted = {"startup": {raylet}, "liveness": {raylet}, "readiness": {haproxy}}
    if pod is HEAD:
        wanted |= {"liveness": {raylet, memory}, "readiness": {raylet, memory}}
    assert {name: {f":{url}" for url in re.findall(r"http://localhost:(\S+)", text)} for name, text in asked.items()} == wanted
    for name, text in asked.items():
        assert text.count("| grep success") == len(wanted[name])
        assert container[f"{name}Probe"]["timeoutSeconds"] > sum(int(seconds) for seconds in re.findall(r"-T (\d+)", text))
    probes = [container["startupProbe"], container["livenessProbe"]]
    assert [probe["periodSeconds"] * probe["failureThreshold"] for probe in probes] == [300, 120]  # seconds; docs/serve.md


def test_a_node_can_be_drained() -> None:
    """Kubernetes finds no `scale` of a RayCluster's pods: with `maxUnavailable` or a percentage it would let none of them go."""
    (budget,) = [one["spec"] for name in MANIFESTS for one in documents(name) if one["kind"] == "PodDisruptionBudget"]
    assert budget == {"minAvailable": 1, "selector": {"matchLabels": {"app": "triform-serve", "ray.io/node-type": "worker"}}}
    least = sum(group["minReplicas"] for group in GROUPS.values())
    assert budget["minAvailable"] < least
    for pod in WORKERS:
        assert {**pod["metadata"]["labels"], "ray.io/node-type": "worker"}.items() >= budget["selector"]["matchLabels"].items()


def test_the_guide_makes_every_secret_that_a_pod_needs() -> None:
    text = "".join((RAY / name).read_text() for name in MANIFESTS)
    needed = {*re.findall(r"secretName: ([a-z-]+)", text), *re.findall(r"secretKeyRef: {name: ([a-z-]+)", text)}
    guide = (RAY.parent.parent / "docs/serve.md").read_text()
    assert needed == {"triform-keys", "triform-redis"}
    assert set(re.findall(r"^kubectl create secret generic (\S+)", guide, re.MULTILINE)) == needed


def test_the_heads_memory_is_the_redis_that_is_deployed() -> None:
    options = CLUSTER["gcsFaultToleranceOptions"]
    service = only("serving/redis.yaml", "Service")
    assert options["redisAddress"] == f"redis://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    (container,) = REDIS["spec"]["containers"]
    secrets = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container["env"]}
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == secrets["PASSWORD"]
    assert service["spec"]["selector"] == REDIS["metadata"]["labels"]


@pytest.mark.parametrize(("name", "group"), [("serve.gpu.yaml", "gpu"), ("serve.mig.yaml", "mig")])
def test_replicas_on_gpus_find_workers_that_have_what_they_ask(name: str, group: str) -> None:
    (app,) = yaml.safe_load((RAY.parent.parent / "ray_apps" / name).read_text())["applications"]
    limits = GROUPS[group]["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits.get("nvidia.com/gpu", GROUPS[group]["rayStartParams"].get("num-gpus", 0)))
    most = app["args"]["autoscaling"]["max_replicas"]
    fit = min(int(int(limits["cpu"]) / app["args"]["num_cpus"]), int(gpus / app["args"]["num_gpus"]))
    assert fit * GROUPS[group]["maxReplicas"] == most
    assert GROUPS[group]["minReplicas"] == 0  # else the nodes stay when the replicas have gone: docs/gpu.md
    asked = app["args"].get("resources", {})
    assert json.loads(json.loads(GROUPS[group]["rayStartParams"].get("resources", '"{}"'))) == asked
    assert {f"nvidia.com/{slice_}" for slice_ in asked} <= set(limits)


@pytest.mark.parametrize(("name", "group"), [("serve.gpu.yaml", "gpu"), ("serve.mig.yaml", "mig")])
def test_replicas_on_gpus_find_an_image_that_has_their_provider(name: str, group: str) -> None:
    (app,) = yaml.safe_load((RAY.parent.parent / "ray_apps" / name).read_text())["applications"]
    image = GROUPS[group]["template"]["spec"]["containers"][0]["image"]
    target = image.rpartition("/")[2].partition(":")[0].removeprefix("triform-")
    (packages,) = re.findall(r"--from=(\S+) /opt/venv", layers(target))
    assert "gpu.txt" in layers(packages)
    assert ("tensorrt-cu13-libs" in layers(packages)) == (app["args"]["provider"] == "tensorrt")
