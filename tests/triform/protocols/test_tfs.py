"""TensorFlow Serving's rows and columns, where a host cannot show it: nothing is copied that need not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from tests.calls import calls_of
from triform.config import Column, InputConfig, ModelConfig
from triform.errors import InvalidInput, InvalidRequest
from triform.features import Features
from triform.models import Served
from triform.protocols import tfs
from triform.protocols.bodies import Call
from triform.signature import Signature, TensorMetadata

Serve = Callable[[str], Served]


def test_numbers_go_to_the_signature_as_they_were_read(served: Serve) -> None:
    rows = [[1, 2, 3]] * 10
    assert tfs.rows_call(rows, served("linear"), tfs.say_rows).inputs["x"] is rows
    assert tfs.columns_call(rows, served("linear"), tfs.say_rows).inputs["x"] is rows


def test_text_without_base64_does_too(served: Serve) -> None:
    rows = ["a", "b"]
    assert tfs.rows_call(rows, served("text"), tfs.say_rows).inputs["x"] is rows


def test_records_and_columns_say_the_same(served: Serve, answered: Callable[[str, Call], Any]) -> None:
    records = [{"carrier": c, "distance": d, "hour": h} for c, d, h in (("UA", 1, None), ("AA", 2.5, 3), ("", 0, 1))]
    columns = {name: [record[name] for record in records] for name in ("hour", "carrier", "distance")}
    by_row = answered("flights", tfs.decode(orjson.dumps({"instances": records}), served("flights")))["predictions"]
    by_column = answered("flights", tfs.decode(orjson.dumps({"inputs": columns}), served("flights")))["outputs"]
    assert by_row == [dict(zip(by_column, values, strict=True)) for values in zip(*by_column.values(), strict=True)]


@pytest.mark.parametrize("values", [1, "text", {"b64": "YQ=="}, None])
def test_a_column_is_a_list(served: Serve, values: Any) -> None:
    asked = {"inputs": {"carrier": ["UA"], "distance": [1], "hour": values}}
    with pytest.raises(InvalidInput, match="column 'hour': expected a list of values"):
        tfs.decode(orjson.dumps(asked), served("flights"))


def test_the_newest_version_first() -> None:
    told = tfs.status({1: True, 12: False, 2: True})["model_version_status"]
    assert [(one["version"], one["state"]) for one in told] == [("12", "END"), ("2", "AVAILABLE"), ("1", "AVAILABLE")]


def test_each_row_is_looked_at_once_however_many_inputs_there_are(served: Serve) -> None:
    inputs = [TensorMetadata(f"x{i}", "FP32", ("rows", 1)) for i in range(20)]
    config = ModelConfig(inputs={"x0": InputConfig(columns=(Column("mapped"),))})
    signature = Signature(tuple(inputs), served("linear").signature.outputs)
    many = Several(served("linear").predictor, Features(signature, config))
    rows = [{t.name: [1.0] for t in inputs} for _ in range(50)]
    assert calls_of(tfs._of_row, lambda: tfs.rows_call(rows, many, tfs.say_rows)) == 50


WITH_A_VALUE = (
    '{"instances": %s}',
    '{"inputs": %s}',
    '{"instances": [{"x": %s}]}',
    '{"inputs": {"x": %s}}',
    '{"instances": [{"carrier": %s, "distance": 1}]}',
    '{"inputs": {"carrier": ["a"], "distance": %s}}',
)


@pytest.mark.parametrize("depth", [31, 33, 64, 65, 300, 990])
@pytest.mark.parametrize("value", ["1", '"a"', "null", '{"b64":"YQ=="}', ""])
@pytest.mark.parametrize("model", ["linear", "text", "flights", "lookup"])
def test_what_is_nested_deeply_is_the_callers_mistake(served: Serve, model: str, value: str, depth: int) -> None:
    """An error of the tree, not of the stack, whoever asks."""
    deep = "[" * depth + value + "]" * depth
    for asked in WITH_A_VALUE:
        with pytest.raises(InvalidRequest):
            served(model).signature.validate(tfs.decode((asked % deep).encode(), served(model)).inputs)


class Several(Served):
    """With a signature of many inputs."""

    @property
    def signature(self) -> Signature:
        return self.features.signature
