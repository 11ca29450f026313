"""What the models take, read from `model.toml`, so that training follows the mapping that triform applies."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

MODEL_TOML = Path(__file__).with_name("model.toml")


@dataclass(frozen=True)
class Columns:
    """The models' input columns. `numeric` is in tensor order; `nullable` are those that may be NaN."""

    text: tuple[str, ...]
    numeric: tuple[str, ...]
    nullable: frozenset[str]

    @property
    def all(self) -> list[str]:
        return [*self.text, *self.numeric]

    @property
    def required(self) -> list[str]:
        """The columns whose null makes a row a dead letter."""
        return [name for name in self.all if name not in self.nullable]


def read_columns(path: Path = MODEL_TOML) -> Columns:
    """Read a `model.toml` whose input `numeric` stacks columns and whose other inputs are a text column each."""
    inputs = tomllib.loads(path.read_text())["inputs"]
    columns = inputs["numeric"]["columns"]
    numeric = [column if isinstance(column, dict) else {"name": column} for column in columns]
    return Columns(
        text=tuple(name for name in inputs if name != "numeric"),
        numeric=tuple(column["name"] for column in numeric),
        nullable=frozenset(column["name"] for column in numeric if column.get("null") == "nan"),
    )
