"""What a process that only predicts has to import: time that a cold start pays."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import triform

HEAVY = {"pyarrow", "boto3", "botocore", "ray", "typer", "rich", "onnx", "pandas", "prometheus_client", "redis"}

PREDICT = """
import json, sys
import triform
assert not {"numpy", "onnxruntime", "msgspec"} & sys.modules.keys(), "importing triform alone costs nothing"
import triform.features, triform.settings, triform.telemetry
from triform.repository import open_repository, resolve
from triform.predictor import Predictor

repository = open_repository(sys.argv[1])
predictor = Predictor.load(repository.package(*resolve(repository, "linear")))
print(json.dumps([predictor.predict({"x": [[1, 1, 1]]})["y"].tolist(), sorted({m.partition(".")[0] for m in sys.modules})]))
"""


def test_a_prediction_imports_nothing_heavy(models: Path, python: Callable[..., Popen[str]]) -> None:
    code = PREDICT.replace("import numpy as np\n", "").replace("linear", "linear")
    with python("-c", code, models) as child:
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    answer, modules = json.loads(out)
    assert answer == [[6.0]]
    assert HEAVY & set(modules) == set()


SURFACE = """
import json, sys
import triform.http
imported = {m.partition(".")[0] for m in sys.modules}
from triform.http import HttpRequest, HttpSurface
from triform.predictor import Predictor
from triform.repository import open_repository
from triform.models import Models
from triform.service import InferenceService

package = open_repository(sys.argv[1]).package("linear", 1)
models = Models(form="lambda")
models.add("linear", 1, lambda: Predictor.load(package))
surface = HttpSurface(InferenceService(models))
for headers in ((), (("accept-encoding", "gzip"), ("accept", "application/json"))):
    answer = surface.handle(HttpRequest("POST", "/invocations", headers, b'{"instances": [[1, 1, 1]]}'))
    assert answer.body == b'{"predictions":[[6.0]]}', answer
asked = {"triform.openapi", "triform.signing", "triform.nonces", "triform.audit"}
lazy = not asked & sys.modules.keys()
assert surface.handle(HttpRequest("GET", "/openapi.json")).status == 200
answered = {m.partition(".")[0] for m in sys.modules}
print(json.dumps([sorted(imported), sorted(answered), lazy]))
"""


def test_the_surface_imports_and_answers_without_anything_heavy(models: Path, python: Callable[..., Popen[str]]) -> None:
    """A Lambda pays for each import at its cold start; the OpenAPI document is made when it is asked for."""
    with python("-c", SURFACE, models) as child:
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    imported, answered, lazy = json.loads(out)
    never = HEAVY | {"pydantic", "starlette", "fastapi", "requests", "aws_lambda_powertools"}
    assert never & set(imported) == set()
    assert never & set(answered) == set()
    assert lazy


def test_the_packages_own_example_runs(models: Path, python: Callable[..., Popen[str]]) -> None:
    """The lines in `triform`'s docstring, as a newcomer would paste them, on another model and its rows."""
    example = textwrap.dedent(inspect.getdoc(triform).split("\n\n", 2)[2])  # type: ignore[union-attr]
    code = example.replace("flight-delay@stable", "linear").replace("array", "[[1, 1, 1]]") + "\nprint(outputs)"
    with python("-c", code, cwd=models.parent) as child:
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert out.startswith("{'y': array([[6.]]")
