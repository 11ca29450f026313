"""The models layer: what a reference takes, and what is pinned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.layers import models
from triform import testing
from triform.errors import DigestMismatch, InvalidRequest, VersionNotFound
from triform.releases import ReleaseLog
from triform.repository import ModelRepository, open_repository, resolve


def test_pinned_says_what_is_served(layers: Path, source: ModelRepository) -> None:
    pinned = json.loads((layers / "models/models/pinned.json").read_text())
    digests = {
        model: {str(v): source.package(model, v).manifest.digest for v in source.versions(model)} for model in source.models()
    }
    assert pinned == {
        "models": {
            "linear": {"revision": 2, "aliases": {"stable": 1, "canary": 2}, "digests": digests["linear"]},
            "lookup": {"revision": 0, "aliases": {"stable": 1}, "digests": digests["lookup"]},
        },
        "format": 1,
    }
    alone = json.loads((layers / "models-lookup/models/pinned.json").read_text())
    assert alone["models"] == {"lookup": pinned["models"]["lookup"]}
    assert not (layers / "models-lookup/models/linear").exists()
    baked = open_repository(layers / "models/models")
    assert ReleaseLog(baked, "linear").current() == ReleaseLog(source, "linear").current()


@pytest.mark.parametrize(
    ("refs", "expected"),
    [
        (["linear@stable"], (2, {"stable": 1})),
        (["linear@canary"], (2, {"canary": 2})),
        (["linear@canary", "linear@stable"], (2, {"stable": 1, "canary": 2})),
        (["linear/2"], (0, {"stable": 2})),
        (["linear/2", "linear/2"], (0, {"stable": 2})),
    ],
)
def test_what_a_reference_takes(source: ModelRepository, refs: list[str], expected: Any) -> None:
    assert models.pin(source, refs) == {"linear": expected}


@pytest.mark.parametrize("refs", [["linear/1", "linear/2"], ["linear@stable", "linear/1"]])
def test_references_that_disagree_are_refused(source: ModelRepository, refs: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="disagrees with another reference to 'linear'"):
        models.pin(source, refs)


def test_part_of_a_release_is_not_passed_off_as_it(source: ModelRepository, tmp_path: Path) -> None:
    pinned = models.place(source, ["linear@stable"], tmp_path)
    assert pinned.models["linear"].revision == 2
    assert resolve(open_repository(tmp_path), "linear") == ("linear", 1)
    assert not (tmp_path / "linear/releases").exists()


def test_a_model_that_fails_full_verification_is_not_placed(tmp_path: Path) -> None:
    repository = testing.repository(tmp_path / "models", {"lookup": testing.lookup(tmp_path / "lookup.onnx")})
    model = repository.package("lookup", 1).folder / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    with pytest.raises(DigestMismatch):
        models.place(repository, ["lookup"], tmp_path / "layer")
    assert not (tmp_path / "layer/pinned.json").exists()
    with pytest.raises(VersionNotFound):
        models.place(repository, ["lookup/9"], tmp_path / "layer")
