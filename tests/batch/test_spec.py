"""What a job is asked to do is checked before anything is read, and errors name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batch.spec import JobSpec, actor_range, read_spec
from triform.errors import ConfigurationError
from triform.settings import Settings

NEEDED: dict[str, Any] = {"repository": "models", "model": "m@stable", "input": ["in"], "output": "out"}

TOML = """
# The nightly job.
repository = "models"   # a folder
model = "m@stable"
input = "in/*.parquet"  # one pattern needs no list
output = "out"
key = ["id"]
keep = "note"
actors = "1:4"
cpus = 0.5
gpus = 0.25
max_dead_letters = 0.5
if_exists = "replace"
compare = 2
"""


def test_a_toml_file_is_a_job_and_options_override_it(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(TOML)
    spec = read_spec(file, {"model": None, "key": [], "keep": ["a", "b"], "actors": "2", "max_dead_letters": 0.0})
    assert spec == JobSpec(
        repository="models",
        model="m@stable",
        input=("in/*.parquet",),
        output="out",
        key=("id",),
        keep=("a", "b"),
        actors="2",
        cpus=0.5,
        gpus=0.25,
        max_dead_letters=0.0,
        if_exists="replace",
        compare=2,
    )


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"input": []}, "input"),
        ({"input": ()}, "input"),
        ({"model": 3}, "model"),
        ({"unknown_key": 1}, "unknown_key"),
        ({"max_dead_letters": -0.1}, "max_dead_letters"),
        ({"max_dead_letters": 1.1}, "max_dead_letters"),
        ({"max_dead_letters": float("nan")}, "max_dead_letters"),
        ({"max_dead_letters": "1%"}, "max_dead_letters"),
        ({"cpus": 0.0}, "cpus"),
        ({"cpus": float("nan")}, "cpus"),
        ({"gpus": -1.0}, "gpus"),
        ({"compare": True}, "compare"),
        ({"policy": "rollout.toml"}, "policy"),
        ({"gpus": float("inf")}, "gpus"),
        ({"gpus": float("nan")}, "gpus"),
        ({"if_exists": "append"}, "if_exists"),
        ({"key": ["id", "id"]}, "key"),
        ({"keep": ["a", ""]}, "keep"),
        ({"keep": [1]}, "keep"),
        *(({"actors": given}, "actors") for given in ("0", 0, -1, "a", "2:1", "0:3", "1:2:3", ":", "", 1.5)),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        read_spec(None, NEEDED | changes)


@pytest.mark.parametrize("missing", NEEDED)
def test_what_is_missing_is_named(missing: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'?{missing}"):
        read_spec(None, NEEDED | {missing: None})


@pytest.mark.parametrize("content", [b"key = [", b"\xff\xfe", b"a = 1\na = 2"])
def test_what_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "job.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"job\.toml: not TOML"):
        read_spec(file, {})


def test_an_unknown_key_of_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(TOML + "actor = 3\n")
    with pytest.raises(ConfigurationError, match=r"job\.toml: .*'actor'"):
        read_spec(file, {})
    with pytest.raises(ConfigurationError, match="absent"):
        read_spec(tmp_path / "absent.toml", {})


@pytest.mark.parametrize(("given", "range_"), [(None, None), (3, (3, 3)), ("3", (3, 3)), ("1:4", (1, 4)), ("2:2", (2, 2))])
def test_actors(given: str | int | None, range_: tuple[int, int] | None) -> None:
    assert actor_range(given) == range_


def test_an_actor_with_gpus_runs_on_them_unless_told_otherwise() -> None:
    assert read_spec(None, NEEDED).runtime().provider == "cpu"
    assert read_spec(None, NEEDED | {"gpus": 0.25}).runtime().provider == "cuda"
    assert read_spec(None, NEEDED | {"gpus": 0.25, "provider": "tensorrt"}).runtime().provider == "tensorrt"


def test_the_environment_comes_after_file_and_options(tmp_path: Path) -> None:
    settings = Settings.from_env({"TRIFORM_REPOSITORY": "from env", "TRIFORM_REQUIRED_PROVIDERS": "CPUExecutionProvider"})
    needed = {name: value for name, value in NEEDED.items() if name != "repository"}
    spec = read_spec(None, needed, settings)
    assert (spec.repository, spec.required_providers) == ("from env", ("CPUExecutionProvider",))
    file = tmp_path / "job.toml"
    file.write_text('repository = "from file"')
    assert read_spec(file, needed, settings).repository == "from file"
    assert read_spec(file, NEEDED, settings).repository == NEEDED["repository"]
