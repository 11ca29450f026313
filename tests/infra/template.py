"""The template that osls renders, and how tests look into it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.layers.archive import archive

Template = dict[str, Any]
PREDICTING = ("Predict", "FlightDelay")
LAYERS = ("runtime", "powertools", "core", "models", "models-flight-delay", "function")


def stand_ins(folder: Path, **content: str) -> Path:
    """Zips in the layers' stead: the template does not depend on what is in them."""
    for name in LAYERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "file.txt").write_text(content.get(name, name))
        archive(folder / name, folder / f"{name}.zip")
    return folder


def of_type(template: Template, kind: str) -> dict[str, Any]:
    return {name: found for name, found in template["Resources"].items() if found["Type"] == kind}


def properties(template: Template, name: str) -> Any:
    return template["Resources"][name]["Properties"]


def references(value: Any) -> Iterator[str]:
    """Logical names that a value mentions."""
    if isinstance(value, list):
        for one in value:
            yield from references(one)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key == "Ref":
                yield inner
            elif key == "Fn::GetAtt":
                yield inner[0] if isinstance(inner, list) else inner.partition(".")[0]
            elif key == "Fn::Sub":
                text, names = inner if isinstance(inner, list) else (inner, {})
                found = re.findall(r"\$\{([^!}][^}.]*)[^}]*\}", text)
                yield from (name for name in found if name not in names)
                yield from references(list(names.values()))
            elif key == "DependsOn":
                yield from [inner] if isinstance(inner, str) else inner
            else:
                yield from references(inner)


def alias_of(template: Template, logical: str) -> Any:
    return template["Resources"][f"{logical}ProvConcLambdaAlias"]


def some(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
