"""The template as a whole: what CloudFormation would be given."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.infra.template import LAYERS, Template, of_type, properties, references
from triform.settings import Settings

ROOT = Path(__file__).parent.parent.parent


def dangling(template: Template) -> set[str]:
    there = {*template["Resources"], *template.get("Parameters", {})}
    return {name for name in references(template) if not name.startswith("AWS::")} - there


@pytest.mark.parametrize("stage", ["dev", "prod", pytest.param("staging", marks=pytest.mark.slow)])
def test_no_reference_dangles_and_no_variable_is_left(rendered: Callable[[str], Template], stage: str) -> None:
    template = rendered(stage)
    assert dangling(template) == set()
    assert not re.search(r"\$\{(self|param|sls|opt|aws|file):", json.dumps(template))
    assert len(list(references(template))) > 100


@pytest.mark.parametrize(
    "value",
    [
        {"Ref": "Gone"},
        {"Fn::GetAtt": ["Gone", "Arn"]},
        {"Fn::GetAtt": "Gone.Arn"},
        {"Fn::Sub": "a-${Gone.Arn}"},
        {"Fn::Sub": "${Gone}"},
    ],
)
def test_a_dangling_reference_would_be_found(prod: Template, value: Any) -> None:
    broken = {"Resources": {**prod["Resources"], "More": {"Type": "X", "Properties": {"a": [value, {"Fn::Sub": "${!Literal}"}]}}}}
    assert dangling(broken) == {"Gone"}


@pytest.mark.parametrize("stage", ["prod", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("dev", "staging"))])
def test_cfn_lint_has_nothing_to_say(rendered: Callable[[str], Template], stage: str, tmp_path: Path) -> None:
    (tmp_path / "template.json").write_text(json.dumps(rendered(stage)))
    # W3005: osls writes DependsOn beside each reference.
    done = lint(tmp_path / "template.json", "--ignore-checks", "W3005")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_cfn_lint_would_say_something(tmp_path: Path) -> None:
    queue = {"Type": "AWS::SQS::Queue", "Properties": {"VisibilityTimeOut": 1}}
    (tmp_path / "template.json").write_text(json.dumps({"Resources": {"Requests": queue}}))
    assert "VisibilityTimeOut" in lint(tmp_path / "template.json").stdout


def lint(template: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("cfn-lint")
    return subprocess.run([program, *options, "-t", template], capture_output=True, text=True, timeout=120, check=False)


def test_functions_have_the_layers_that_were_built(prod: Template) -> None:
    names = {layer["Properties"]["LayerName"] for layer in of_type(prod, "AWS::Lambda::LayerVersion").values()}
    assert names == {f"triform-prod-{name}" for name in LAYERS if name != "function"}
    for function in of_type(prod, "AWS::Lambda::Function").values():
        layers = function["Properties"].get("Layers", [])
        assert len(layers) <= 5
        assert bool(layers) == ("ImageUri" not in function["Properties"]["Code"])


def test_functions_are_given_settings_that_there_are(prod: Template) -> None:
    """Of each function whose handler is here: an unknown key would refuse its start."""
    known = {f"TRIFORM_{field.name.upper()}" for field in msgspec.structs.fields(Settings)}
    for name, function in of_type(prod, "AWS::Lambda::Function").items():
        handler = function["Properties"].get("Handler") or function["Properties"]["ImageConfig"]["Command"][0]
        given = {key for key in function["Properties"]["Environment"]["Variables"] if key.startswith("TRIFORM_")}
        if (ROOT / handler.removesuffix(".handler").replace(".", "/")).with_suffix(".py").is_file():
            assert given <= known, name


def test_the_cache_of_models_fits_the_functions_disk(prod: Template) -> None:
    function = properties(prod, "S3LambdaFunction")
    cache = int(function["Environment"]["Variables"]["TRIFORM_CACHE_BYTES"])
    assert cache == 1 << 30
    assert 2 * cache <= function["EphemeralStorage"]["Size"] << 20


def test_no_stage_counts_for_another(prod: Template, dev: Template) -> None:
    for template, namespace in (prod, "Triform/prod"), (dev, "Triform/dev"):
        for function in of_type(template, "AWS::Lambda::Function").values():
            assert function["Properties"]["Environment"]["Variables"]["POWERTOOLS_METRICS_NAMESPACE"] == namespace
        told = json.dumps(template)
        assert set(re.findall(r"Triform(?:/\w+)?", told)) == {namespace}
        assert told.count(namespace) >= 7 + 2 + 9
