"""TensorFlow Serving's RESTful API, version 1. Each case names the section that it holds the host to."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from tests.conformance.hosts import Send

PREDICT = "/v1/models/linear:predict"
ROWS = {"instances": [[1, 2, 3], [4, 5, 6]]}


@pytest.mark.parametrize("path", [PREDICT, "/v1/models/linear/versions/1:predict", "/v1/models/linear/labels/stable:predict"])
def test_rows(post: Callable[..., Any], path: str) -> None:
    """Predict API, URL; row format: one input and one output go without their names."""
    assert post(path, ROWS) == {"predictions": [[14.0], [32.0]]}


def test_columns(post: Callable[..., Any]) -> None:
    """Predict API, column format: "inputs" are answered with "outputs"; the single one goes without its name."""
    assert post(PREDICT, {"inputs": [[1, 2, 3], [4, 5, 6]]}) == {"outputs": [[14.0], [32.0]]}
    assert post(PREDICT, {"inputs": {"x": [[1, 2, 3]]}}) == {"outputs": [[14.0]]}


def test_rows_with_names(post: Callable[..., Any]) -> None:
    """Predict API, row format: an object of named tensors a row."""
    assert post(PREDICT, {"instances": [{"x": [1, 2, 3]}]}) == {"predictions": [[14.0]]}


@pytest.mark.parametrize("name", ["serving_default", ""])
def test_the_default_signature_may_be_named(post: Callable[..., Any], name: str) -> None:
    """Predict API, request format: "signature_name", serving_default if it is not given."""
    assert post(PREDICT, {"signature_name": name, **ROWS}) == {"predictions": [[14.0], [32.0]]}


def test_another_signature(send: Send, refused: Callable[..., str]) -> None:
    """Predict API: a signature that the model does not have."""
    body = orjson.dumps({"signature_name": "other", **ROWS})
    refused(send("POST", PREDICT, {}, body), 400, "invalid_request")


def many(rows: int) -> dict[str, list[Any]]:
    """Named tensors for the model of 13 inputs, row i of number i."""
    import triform.signature

    kinds = {"BYTES": str, "BOOL": bool}
    return {f"in_{n}": [kinds.get(n, int)(i) for i in range(rows)] for n in triform.signature.BY_OIP}


def test_several_inputs_and_outputs_keep_their_names(post: Callable[..., Any]) -> None:
    """Predict API: rows are objects where there are several outputs, columns an object of lists; no transposing by the caller."""
    named = many(3)
    rows = [{name: values[i] for name, values in named.items()} for i in range(3)]
    expected = {name.replace("in_", "out_"): values for name, values in named.items()}
    answer = post("/v1/models/every:predict", {"instances": rows})
    assert answer == {"predictions": [{name: values[i] for name, values in expected.items()} for i in range(3)]}
    assert post("/v1/models/every:predict", {"inputs": named}) == {"outputs": expected}


def test_bytes_by_base64(post: Callable[..., Any]) -> None:
    """Encoding binary values: {"b64": ...}, in rows, named or not, and in columns."""
    text = "naïve ☃"
    b64 = {"b64": b64encode(text.encode()).decode()}
    path = "/v1/models/text:predict"
    assert post(path, {"instances": [b64, "plain"]}) == {"predictions": [text, "plain"]}
    assert post(path, {"instances": [{"x": b64}, {"x": "plain"}]}) == {"predictions": [text, "plain"]}
    assert post(path, {"inputs": ["plain", b64]}) == {"outputs": ["plain", text]}
    assert post(path, {"inputs": {"x": [b64]}}) == {"outputs": [text]}


@pytest.mark.parametrize("b64", ["!", "YQ", 1, None, ["YQ=="], {"b64": "YQ=="}, "/w=="])
def test_what_is_no_base64(send: Send, refused: Callable[..., str], b64: Any) -> None:
    """Encoding binary values."""
    for asked in ({"instances": [{"b64": b64}]}, {"inputs": ["a", {"b64": b64}]}):
        refused(send("POST", "/v1/models/text:predict", {}, orjson.dumps(asked)), 400, "invalid_input")


def test_records(post: Callable[..., Any]) -> None:
    """Predict API, row format, with the columns of model.toml: the answer's rows are named columns, too."""
    rows = [{"carrier": "UA", "distance": 2.5, "hour": 3}, {"hour": None, "distance": 2, "carrier": {"b64": "QUE="}, "tail": 1}]
    first, second = post("/v1/models/flights:predict", {"instances": rows})["predictions"]
    assert first == {"p_on_time": 2.5, "p_late": 3.0, "outcome": "late", "airline": "UA"}
    assert (second["p_late"], second["airline"]) == (None, "AA")


def test_booleans_are_0_and_1_in_columns(post: Callable[..., Any]) -> None:
    """Predict API, with the columns of model.toml: as those of a Parquet file; a tensor of numbers takes none."""
    row = {"carrier": "UA", "distance": True, "hour": False}
    expected = {"p_on_time": 1.0, "p_late": 0.0, "outcome": "on time", "airline": "UA"}
    assert post("/v1/models/flights:predict", {"instances": [row]}) == {"predictions": [expected]}
    columns = {name: [value] for name, value in row.items()}
    assert post("/v1/models/flights:predict", {"inputs": columns})["outputs"]["p_on_time"] == [1.0]


def test_columns_that_the_model_does_not_read_are_passed_over(post: Callable[..., Any]) -> None:
    """Predict API, with the columns of model.toml: as in a Parquet file, there may be more."""
    row = {"carrier": "UA", "distance": 1, "hour": 2, "tail": {"any": ["thing"]}, "hours": 7}
    plain = {name: row[name] for name in ("carrier", "distance", "hour")}
    answer = post("/v1/models/flights:predict", {"instances": [plain]})
    assert post("/v1/models/flights:predict", {"instances": [row]}) == answer
    columns = {name: [value] for name, value in row.items() if name != "tail"}
    assert post("/v1/models/flights:predict", {"inputs": columns})["outputs"]["p_late"] == [2.0]


def test_columns_that_the_package_maps(post: Callable[..., Any]) -> None:
    """Predict API, column format, with the columns of model.toml."""
    columns = {"carrier": ["UA", {"b64": "QUE="}], "distance": [9, 2], "hour": [3, 4]}
    assert post("/v1/models/flights:predict", {"inputs": columns}) == {
        "outputs": {"p_on_time": [9.0, 2.0], "p_late": [3.0, 4.0], "outcome": ["on time", "late"], "airline": ["UA", "AA"]}
    }


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([{"carrier": "UA", "hour": 3}], "missing_value"),
        ([{"carrier": "UA", "distance": None, "hour": 3}], "missing_value"),
        ([{"carrier": "UA", "distance": "far", "hour": 3}], "invalid_input"),
        ([{"carrier": 7, "distance": 1, "hour": 3}], "invalid_input"),
        ([{"carrier": "UA", "distance": [1], "hour": 3}], "invalid_input"),
        ([{"carrier": "UA", "distance": {"a": 1}, "hour": 3}], "invalid_input"),
        ([{"carrier": "UA", "distance": 1, "hour": 3}, 5], "invalid_input"),
        ([{"carrier": "UA", "distance": 1, "hour": 3}, {}], "missing_value"),
        ([{}], "invalid_input"),
    ],
)
def test_records_that_do_not_fit(send: Send, refused: Callable[..., str], rows: list[Any], code: str) -> None:
    """Predict API, row format, with the columns of model.toml: the error names the row."""
    message = refused(send("POST", "/v1/models/flights:predict", {}, orjson.dumps({"instances": rows})), 400, code)
    assert f"row {len(rows) - 1}" in message


@pytest.mark.parametrize("asked", [{"instances": []}, {"inputs": []}, {"inputs": {"x": []}}])
@pytest.mark.parametrize("model", ["linear", "text"])
def test_no_rows(post: Callable[..., Any], asked: Any, model: str) -> None:
    """Predict API: none in, none out."""
    assert list(post(f"/v1/models/{model}:predict", asked).values()) == [[]]


def test_no_rows_of_several_inputs(post: Callable[..., Any]) -> None:
    """Predict API: none in, none out, however many inputs there are."""
    assert post("/v1/models/every:predict", {"instances": []}) == {"predictions": []}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"instances": None},
        {**ROWS, "inputs": [[1, 2, 3]]},
        {"instances": {"x": [1, 2, 3]}},
        {"instances": [[1, 2]]},
        {"instances": [[1, 2, 3], [1, 2]]},
        {"instances": [[1, 2, "3"]]},
        {"instances": [[1, 2, None]]},
        {"instances": [[1, 2, True]]},
        {"inputs": [[True, False, True]]},
        {"instances": [[[1, 2, 3]]]},
        {"instances": [{"x": [1, 2, 3]}, [1, 2, 3]]},
        {"instances": [{"x": [1, 2, 3], "z": 1}, {"y": 1}]},
        {"instances": [{"z": [1, 2, 3]}]},
        {"inputs": {"x": [[1, 2, 3]], "z": [1]}},
        {"inputs": {"z": [1]}},
        {"inputs": "text"},
        {"inputs": 1},
        {"signature_name": 1, **ROWS},
        [],
        1,
        None,
        "instances",
    ],
)
def test_what_does_not_fit(send: Send, refused: Callable[..., str], asked: Any) -> None:
    """Predict API, request format."""
    answer = send("POST", PREDICT, {}, orjson.dumps(asked))
    refused(answer, 400, orjson.loads(answer.body)["code"])


@pytest.mark.parametrize("rows", [[[1]], [{"in_BOOL": True}], [1]])
def test_a_model_with_several_inputs_needs_them_by_name(send: Send, refused: Callable[..., str], rows: Any) -> None:
    """Predict API, row format: "a list of ... objects" where the model takes several named inputs."""
    answer = send("POST", "/v1/models/every:predict", {}, orjson.dumps({"instances": rows}))
    refused(answer, 400, orjson.loads(answer.body)["code"])


@pytest.mark.parametrize("path", ["/v1/models/linear", "/v1/models/linear/versions/1", "/v1/models/linear/labels/stable"])
def test_status(send: Send, path: str) -> None:
    """Model status API."""
    answer = send("GET", path)
    assert (answer.status, orjson.loads(answer.body)) == (
        200,
        {"model_version_status": [{"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}]},
    )


@pytest.mark.parametrize(
    "path", ["/v1/models/linear/metadata", "/v1/models/linear/versions/1/metadata", "/v1/models/linear/labels/stable/metadata"]
)
def test_metadata(send: Send, path: str) -> None:
    """Model metadata API: GetModelMetadataResponse as JSON."""
    answer = send("GET", path)
    told = orjson.loads(answer.body)
    assert (answer.status, told["model_spec"]) == (200, {"name": "linear", "signature_name": "", "version": "1"})
    signature = told["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["method_name"] == "tensorflow/serving/predict"
    assert signature["inputs"] == {
        "x": {
            "dtype": "DT_FLOAT",
            "tensor_shape": {"dim": [{"size": "-1", "name": ""}, {"size": "3", "name": ""}], "unknown_rank": False},
            "name": "x",
        }
    }
    assert list(signature["outputs"]) == ["y"]


@pytest.mark.parametrize("verb", ["classify", "regress"])
@pytest.mark.parametrize("which", ["", "/versions/1", "/labels/stable"])
def test_classify_and_regress_are_not_offered(send: Send, refused: Callable[..., str], verb: str, which: str) -> None:
    """Classify and Regress API: they take tf.Example."""
    refused(send("POST", f"/v1/models/linear{which}:{verb}", {}, b'{"examples": []}'), 404, "unsupported_method")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/models/nobody:predict", 404, "model_not_found"),
        ("POST", "/v1/models/linear/versions/7:predict", 404, "version_not_found"),
        ("POST", "/v1/models/linear/versions/0:predict", 404, "version_not_found"),
        ("POST", "/v1/models/linear/labels/nightly:predict", 404, "alias_not_found"),
        ("POST", "/v1/models/linear:explain", 404, "route_not_found"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
        ("GET", "/v1/models/linear/versions/7", 404, "version_not_found"),
        ("GET", "/v1/models/linear/labels/nightly", 404, "alias_not_found"),
        ("GET", "/v1/models/nobody/metadata", 404, "model_not_found"),
        ("GET", "/v1/models/linear:predict", 405, "method_not_allowed"),
        ("POST", "/v1/models/linear", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_there(send: Send, refused: Callable[..., str], method: str, path: str, status: int, code: str) -> None:
    """URL of each API: host:port/v1/models/${MODEL_NAME}[/versions/${VERSION}|/labels/${LABEL}]."""
    answer = send(method, path, {}, orjson.dumps(ROWS) if method == "POST" else b"")
    refused(answer, status, code)
    if status == 405:
        assert answer.headers["allow"] == ("POST" if path.endswith("predict") else "GET, HEAD")


def test_rows_that_the_model_cannot_answer(send: Send, refused: Callable[..., str]) -> None:
    """Predict API: the model raised, which is the rows' fault."""
    refused(send("POST", "/v1/models/lookup:predict", {}, b'{"instances": [3, 99]}'), 422, "run_failed")
