"""`model.toml`: what the user says about a model, typed and checked. Unknown keys are refused by name.

    description = "..."
    [inputs.X]                          # one tensor [rows, F] stacked from F columns
    columns = ["a", { name = "b", null = "nan" }]
    [inputs.state]
    batch_axis = 1                      # the graph holds the rows on axis 1; callers see them on axis 0
    [inputs.sr]
    constant = 16000                    # always fed so; callers never see it
    [outputs.probabilities]
    columns = ["p_on_time", "p_late"]   # the columns of [rows, 2]
    [outputs.label]
    labels = ["on time", "late"]        # what an integer class stands for
    [outputs.debug]
    drop = true
    [runtime]
    threads = 1
    [batching]
    pad_to = [1, 8, 32, 128]            # run at these row counts only
    [key]                               # what keeps a caller on a version beside a canary (splitting.py)
    header = "x-user-id"
    column = "user_id"

The packager copies the file into the package and writes what it means, defaults filled in, to the manifest: nothing reads
TOML when a model is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from triform.errors import ConfigurationError
from triform.signature import Dim
from triform.splitting import KeyRule

DEAD_LETTER: Final = "dead-letter"
NAN: Final = "nan"

T = TypeVar("T")


class Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named column and what stands in for its nulls: "nan" (floats), a value, or nothing: "dead-letter" refuses the row."""

    name: str
    null: bool | int | float | str = DEAD_LETTER


class InputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    columns: tuple[str | Column, ...] = ()
    null: bool | int | float | str = DEAD_LETTER
    batch_axis: int = 0
    constant: bool | int | float | str | list[Any] | None = None
    shape: tuple[Dim, ...] | None = None  # says more than the graph declares, e.g. ["rows", 3, 48, "width"]

    def named(self, tensor: str) -> tuple[Column, ...]:
        """The columns with their null policies; a tensor without any is fed from the column of its own name."""
        names = self.columns or (tensor,)
        return tuple(c if isinstance(c, Column) else Column(c, self.null) for c in names)


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    batch_axis: int = 0
    drop: bool = False


class RuntimeNeeds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    threads: int = 1


class Batching(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    max_rows: int = 8192  # the most rows one run takes; more are run in turn
    pad_to: tuple[int, ...] = ()


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    description: str = ""
    inputs: dict[str, InputConfig] = {}
    outputs: dict[str, OutputConfig] = {}
    runtime: RuntimeNeeds = RuntimeNeeds()
    batching: Batching = Batching()
    key: KeyRule = KeyRule()

    def __post_init__(self) -> None:
        pad, rows = self.batching.pad_to, self.batching.max_rows
        _require(self.runtime.threads >= 1, "runtime.threads", "a positive number", self.runtime.threads)
        _require(rows >= 1, "batching.max_rows", "a positive number", rows)
        _require(
            list(pad) == sorted(set(pad)) and all(p >= 1 for p in pad),
            "batching.pad_to",
            "rising positive numbers",
            list(pad),
        )
        for name, out in self.outputs.items():
            _unique(out.columns, f"outputs.{name}.columns")
        for name, given in self.inputs.items():
            _unique([c.name for c in given.named(name)], f"inputs.{name}.columns")

    def input(self, name: str) -> InputConfig:
        return self.inputs.get(name, InputConfig())

    def without_outputs(self) -> ModelConfig:
        return msgspec.structs.replace(self, outputs={})

    def output(self, name: str) -> OutputConfig:
        return self.outputs.get(name, OutputConfig())


def _require(holds: bool, key: str, expected: str, got: object) -> None:
    if not holds:
        raise ConfigurationError(f"model.toml: {key}: expected {expected}, got {got}")


def _unique(names: tuple[str, ...] | list[str], key: str) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    _require(not twice, key, "each name once", f"{', '.join(twice)} twice")


def read_config(path: Path) -> ModelConfig:
    """The checked content of a `model.toml`. Raises `ConfigurationError`, naming the file and the key."""
    return convert(read_toml(path), ModelConfig, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises `ConfigurationError`, naming the file."""
    import tomllib  # whoever serves has the manifest, which is JSON: a cold start does not pay for it

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not TOML: {error}") from error


def convert(content: Mapping[str, Any], kind: type[T], source: str) -> T:
    """`content` as a `kind` struct; a wrong or unknown key raises `ConfigurationError` naming `source` and the key."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{source}: {str(error).replace('`', chr(39))}") from error
