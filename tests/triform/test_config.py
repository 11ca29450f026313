"""model.toml: what it may say, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from triform.config import Batching, Column, InputConfig, ModelConfig, OutputConfig, RuntimeNeeds, read_config
from triform.errors import ConfigurationError
from triform.splitting import KeyRule

EVERYTHING = """
description = "late or not"
[inputs.X]
columns = ["a", { name = "b", null = "nan" }, { name = "c", null = 0 }]
null = -1
[inputs.state]
batch_axis = 1
shape = ["rows", 3, 48, -1]
[inputs.sr]
constant = 16000
[outputs.probabilities]
columns = ["p_on_time", "p_late"]
[outputs.label]
labels = ["on time", "late"]
[outputs.debug]
drop = true
[runtime]
threads = 2
[batching]
max_rows = 128
pad_to = [1, 8, 32, 128]
[key]
header = "x-user-id"
column = "user_id"
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "model.toml"


def test_everything_that_it_can_say(toml: Path) -> None:
    toml.write_text(EVERYTHING)
    assert read_config(toml) == ModelConfig(
        description="late or not",
        inputs={
            "X": InputConfig(columns=("a", Column("b", "nan"), Column("c", 0)), null=-1),
            "state": InputConfig(batch_axis=1, shape=("rows", 3, 48, -1)),
            "sr": InputConfig(constant=16000),
        },
        outputs={
            "probabilities": OutputConfig(columns=("p_on_time", "p_late")),
            "label": OutputConfig(labels=("on time", "late")),
            "debug": OutputConfig(drop=True),
        },
        runtime=RuntimeNeeds(threads=2),
        batching=Batching(max_rows=128, pad_to=(1, 8, 32, 128)),
        key=KeyRule("x-user-id", "user_id"),
    )


def test_an_empty_file_means_the_defaults(toml: Path) -> None:
    toml.write_text("")
    assert read_config(toml) == ModelConfig()


def test_a_columns_null_is_its_own_or_the_inputs() -> None:
    given = InputConfig(columns=("a", Column("b", "nan")), null=0)
    assert given.named("X") == (Column("a", 0), Column("b", "nan"))
    assert InputConfig(null="nan").named("X") == (Column("X", "nan"),)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("descripton = 'x'", "unknown field 'descripton'"),
        ("[inputs.X]\ncolums = ['a']", "$.inputs[...]"),
        ("[inputs.X]\ncolumns = 'a'", "$.inputs[...].columns"),
        ("[inputs.X]\ncolumns = ['a', 'b', 'a']", "inputs.X.columns: expected each name once, got a twice"),
        ("[outputs.y]\ncolumns = ['a', 'a']", "outputs.y.columns: expected each name once, got a twice"),
        ("[outputs.y]\ndrop = 'yes'", "$.outputs[...].drop"),
        ("[runtime]\nthreads = 0", "runtime.threads: expected a positive number, got 0"),
        ("[runtime]\nthreads = 1.5", "$.runtime.threads"),
        ("[runtime]\nthreads = nan", "$.runtime.threads"),
        ("[batching]\nmax_rows = -1", "batching.max_rows: expected a positive number, got -1"),
        ("[batching]\npad_to = [8, 1]", "batching.pad_to: expected rising positive numbers, got [8, 1]"),
        ("[batching]\npad_to = [0, 1]", "batching.pad_to: expected rising positive numbers, got [0, 1]"),
        ("[batching]\npad_to = [1, 1]", "batching.pad_to"),
        ("[runtime", "not TOML"),
        (b"description = '\xff'", "not TOML"),
    ],
)
def test_what_it_cannot_say_is_named(content: str | bytes, told: str, toml: Path) -> None:
    toml.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError) as error:
        read_config(toml)
    assert told in str(error.value)
    assert "model.toml: " in str(error.value)


def test_a_file_that_is_not_there(toml: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.toml: cannot be read \(No such file or directory\)"):
        read_config(toml)
