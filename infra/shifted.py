"""What serverless.yml and infra/lambda/*.yml say of the functions that CodeDeploy moves, for who renders something beside them.

serverless.yml: custom.hooks, layers ─┐
functions.yml: layers of a function ──┼─► Shifted
rollout.yml: its group's alarms ──────┘
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

ROOT: Final = Path(__file__).parent.parent


class Shifted(NamedTuple):
    """A function by its name there and in CloudFormation; `alarms` of its deployment group; `layers`: their folders' names."""

    name: str
    logical: str
    alarms: tuple[Any, ...]
    layers: tuple[str, ...]


class _Tags(yaml.SafeLoader):  # type: ignore[misc]  # yaml ships no types
    """CloudFormation's short tags as it writes them in JSON: `!Ref x` is {"Ref": "x"}."""


def _tagged(loader: _Tags, tag: str, node: Any) -> dict[str, Any]:
    value = loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else loader.construct_sequence(node, deep=True)
    return {tag if tag == "Ref" else f"Fn::{tag}": value}


_Tags.add_multi_constructor("!", _tagged)


def shifted_functions() -> list[Shifted]:
    """In the order of serverless.yml."""
    service, functions = _read("serverless.yml"), _read("infra/lambda/functions.yml")
    rollout = _read("infra/lambda/rollout.yml")["Resources"]
    custom = service["custom"]
    artifacts = {
        f"{_upper(name)}LambdaLayer": Path(_said(layer["package"]["artifact"], custom)).stem
        for name, layer in service["layers"].items()
    }
    return [
        Shifted(
            name,
            _upper(name),
            tuple(rollout[f"{_upper(name)}Rollout"]["Properties"]["AlarmConfiguration"]["Alarms"]),
            tuple(artifacts[layer["Ref"]] for layer in functions[name]["layers"]),
        )
        for name in custom["hooks"].values()
    ]


def _read(name: str) -> Any:
    return yaml.load((ROOT / name).read_text(), _Tags)  # noqa: S506 - a SafeLoader


def _said(text: str, custom: dict[str, Any]) -> str:
    return re.sub(r"\$\{self:custom\.(\w+)\}", lambda found: str(custom[found[1]]), text)


def _upper(name: str) -> str:
    """As osls makes logical names."""
    return name[0].upper() + name[1:]
