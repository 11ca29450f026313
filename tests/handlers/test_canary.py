"""Stable and canary in one function: what a layer or repository holds of a release, and what the function tells of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest

from handlers._boot import Booted, boot
from handlers._function import Function
from infra.layers import models as layer
from tests.canaries import USERS, Released, answers, build, records
from tests.handlers.conftest import context
from tests.handlers.starting import golden_event
from triform.canary import IN_A_ROW


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return build(tmp_path_factory.mktemp("canaries"))


def booted(root: Path, **environ: str) -> Booted:
    named = {"TRIFORM_REPOSITORY": str(root), "TRIFORM_DEFAULT_MODEL": "scored", "TRIFORM_ALLOW_ANONYMOUS": "true"}
    return boot(named | environ)


def ask(function: Function, model: str, rows: list[Any], **headers: str) -> tuple[int, dict[str, str], Any]:
    event = golden_event("http-v2") | {"rawPath": f"/v1/models/{model}:predict", "isBase64Encoded": False}
    event["pathParameters"] = {"proxy": f"v1/models/{model}:predict"}
    event["headers"] = {"content-type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}
    answer = function(event | {"body": json.dumps({"instances": rows})}, context())
    return answer["statusCode"], answer["headers"], orjson.loads(answer["body"])


@pytest.mark.parametrize("of", ["repository", "layer"])
@pytest.mark.parametrize("initialization", ["on-demand", "provisioned-concurrency"])
def test_a_function_that_holds_both_splits_as_every_host_does(
    released: Released, tmp_path: Path, of: str, initialization: str
) -> None:
    root = released.root
    if of == "layer":
        root = tmp_path / "layer"
        layer.place(released.repository, ["scored", "lookup"], root)
    function = Function(booted(root, AWS_LAMBDA_INITIALIZATION_TYPE=initialization))
    split = released.split()
    versions = [split.choose(user.encode()) for user in USERS]
    status, headers, body = ask(function, "scored", records(USERS))
    assert (status, headers["x-triform-model"]) == (200, "scored/1, scored/2")
    assert body["predictions"] == answers(USERS, versions)
    for user, version in zip(USERS, versions, strict=True):
        assert ask(function, "scored", records(["somebody"]), x_user=user)[1]["x-triform-model"] == f"scored/{version}"


@pytest.mark.parametrize("name", ["jürgen", "Юрий"])
def test_an_event_may_have_read_a_header_as_utf8(released: Released, name: str) -> None:
    function, users = Function(booted(released.root)), [f"{name}-{i}" for i in range(12)]
    seen = [ask(function, "scored", records(["somebody"]), x_user=user)[1]["x-triform-model"] for user in users]
    assert seen == [f"scored/{released.split().choose(user.encode())}" for user in users]


def test_a_direct_invocation_names_both(released: Released) -> None:
    answer = Function(booted(released.root))({"model": "scored", "instances": records(USERS)}, context())
    assert answer["model"] == "scored/1, scored/2"


def test_a_function_cuts_its_canary_off_and_says_so(released: Released, capsys: pytest.CaptureFixture[str]) -> None:
    function = Function(booted(released.root))
    keys = released.keys_of(2, "lookup", wanted=IN_A_ROW)
    assert [ask(function, "lookup", [50], x_request_id=key)[0] for key in keys * 2] == [422] * IN_A_ROW + [200] * IN_A_ROW
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["level"] for line in lines if "gets no more keys here" in str(line.get("message"))] == ["WARNING"]
    (cut,) = [line for line in lines if "triform_canary_cuts_total" in line]
    assert (cut["model"], cut["version"], cut["variant"], cut["triform_canary_cuts_total"]) == ("lookup", "2", "canary", [1.0])
    weights = [line for line in lines if line.get("model") == "lookup" and "triform_split_weight" in line]
    for variant, told in ("stable", [[0.5], [1.0]]), ("canary", [[0.5], [0.0]]):
        assert [line["triform_split_weight"] for line in weights if line["variant"] == variant] == told


def test_an_answer_of_both_that_cannot_be_given_is_one_error(
    released: Released, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers._events.HttpApi.limit", 10)
    assert ask(Function(booted(released.root)), "scored", records(USERS))[0] == 413
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["code"] for line in lines if line.get("message") == "request"] == ["answer_too_large"]


@pytest.mark.parametrize("part", ["scored@stable", "scored/1"])
def test_a_layer_with_a_part_of_the_release_shares_nothing(released: Released, tmp_path: Path, part: str) -> None:
    layer.place(released.repository, [part], tmp_path / "layer")
    function = Function(booted(tmp_path / "layer"))
    assert {ask(function, "scored", records([user]))[1]["x-triform-model"] for user in USERS} == {"scored/1"}


def test_a_layer_whose_release_is_another_shares_nothing(released: Released, tmp_path: Path) -> None:
    """What is pinned is what is served; without the release that said so nobody knows whose keys are whose."""
    layer.place(released.repository, ["scored"], tmp_path / "layer")
    shutil.rmtree(tmp_path / "layer/scored/releases")
    function = Function(booted(tmp_path / "layer"))
    assert {ask(function, "scored", records([user]))[1]["x-triform-model"] for user in USERS} == {"scored/1"}
