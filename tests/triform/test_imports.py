"""What a process that only predicts has to import: time that a cold start pays."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import triform

HEAVY = {"pyarrow", "boto3", "botocore", "ray", "typer", "rich", "onnx", "pandas", "prometheus_client"}

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


def test_the_packages_own_example_runs(models: Path, python: Callable[..., Popen[str]]) -> None:
    """The lines in `triform`'s docstring, as a newcomer would paste them, on another model and its rows."""
    example = textwrap.dedent(inspect.getdoc(triform).split("\n\n", 2)[2])  # type: ignore[union-attr]
    code = example.replace("flight-delay@stable", "linear").replace("array", "[[1, 1, 1]]") + "\nprint(outputs)"
    with python("-c", code, cwd=models.parent) as child:
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert out.startswith("{'y': array([[6.]]")
