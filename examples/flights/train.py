"""Two models of "15 minutes late or more" as ONNX graphs that hold all their own preprocessing.

Flow: partitions -> `load_season` (Jan..Sep to train, Oct..Dec to evaluate) -> scikit-learn Pipeline -> ONNX.

A graph takes three text tensors, `carrier`, `origin` and `dest` [N, 1], and `numeric` float32 [N, F] in the
order of `model.toml`; it gives `label` int64 [N] and `probabilities` float32 [N, 2] (on time, late). The same
rows on the same machine and library versions give the same bytes.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from examples.flights.data import read_partitions
from examples.flights.evaluate import EVALUATION_MONTHS, LATE_MINUTES, metrics
from examples.flights.mapping import Columns, read_columns

TRAINING_MONTHS = range(1, 10)
AGREEMENT_ROWS = 5_000
# At most these: skl2onnx declares the least opset that the operators in the graph need.
OPSETS = {"": 17, "ai.onnx.ml": 3}


@dataclass(frozen=True)
class Season:
    """Flights whose delay is known and whose required columns are filled.

    features: [N, 3 + F], text columns (object), then numeric ones (float32; NaN where the mapping allows it).
    late: int64 [N], 1 if the flight arrived `LATE_MINUTES` late or more.
    """

    features: pd.DataFrame
    late: "np.ndarray[Any, np.dtype[np.int64]]"


@dataclass(frozen=True)
class Trained:
    """A model as it ships, with what was measured on the way.

    evaluation: AUC, Brier score, log loss and rows of Oct..Dec, of the ONNX graph itself.
    disagreement: greatest absolute difference from scikit-learn's probabilities on `AGREEMENT_ROWS` of them.
    seconds: of fitting.
    """

    onnx: bytes
    evaluation: dict[str, float]
    disagreement: float
    seconds: float


def load_season(table: pa.Table, months: range, columns: Columns) -> Season:
    """The rows of `table` in `months` fit to train or evaluate on (see `Season`)."""
    kept = pc.is_in(table["month_of_year"], pa.array(months, pa.int16()))
    for name in ["arr_delay", *columns.required]:
        kept = pc.and_(kept, pc.is_valid(table[name]))
    rows = table.filter(kept)
    # float32 before training, not after: the thresholds must split the very numbers that the graph will see.
    numeric = {name: rows[name].to_numpy().astype(np.float32) for name in columns.numeric}
    text = {name: rows[name].to_numpy().astype(object) for name in columns.text}
    return Season(
        features=pd.DataFrame(text | numeric),
        late=(rows["arr_delay"].to_numpy() >= LATE_MINUTES).astype(np.int64),
    )


def logistic_regression(columns: Columns) -> Pipeline:
    """Version 1: one-hot text (an unknown value is all zeros), imputed and scaled numbers, a linear model."""
    text, numeric = _positions(columns)
    scaled = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    encode = ColumnTransformer(
        [("text", OneHotEncoder(handle_unknown="ignore"), text), ("numeric", scaled, numeric)],
        sparse_threshold=1.0,  # 3 of some 120 one-hot columns are set: stay sparse whatever the density
    )
    return Pipeline([("encode", encode), ("model", LogisticRegression(max_iter=300))])


def gradient_boosting(columns: Columns) -> Pipeline:
    """Version 2: text as ordinals (an unknown value is -1), imputed numbers, 60 trees of depth 6.

    The settings are those with the least log loss when each quarter of Jan..Sep is held out in turn.
    """
    text, numeric = _positions(columns)
    ordinal = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, dtype=np.float32)
    imputed = SimpleImputer(strategy="median")
    encode = ColumnTransformer([("text", ordinal, text), ("numeric", imputed, numeric)])
    trees = GradientBoostingClassifier(
        n_estimators=60,
        learning_rate=0.08,
        max_depth=6,
        max_features=4,
        min_samples_leaf=50,
        subsample=0.2,
        random_state=0,
    )
    return Pipeline([("encode", encode), ("model", trees)])


RECIPES: Mapping[int, Callable[[Columns], Pipeline]] = {1: logistic_regression, 2: gradient_boosting}


def train(version: int, folder: Path) -> Trained:
    """Train, convert and measure model `version` (a key of `RECIPES`) on the partitions in `folder`."""
    columns, table = read_columns(), read_partitions(folder)
    season = load_season(table, TRAINING_MONTHS, columns)
    started = time.perf_counter()
    pipeline = RECIPES[version](columns).fit(season.features, season.late)
    seconds = time.perf_counter() - started
    onnx = to_onnx(pipeline, columns, name=f"flight-delay-{version}")
    held_out = load_season(table, EVALUATION_MONTHS, columns)
    p_late = score(onnx, held_out.features, columns)[:, 1]
    return Trained(
        onnx=onnx,
        evaluation=metrics(held_out.late, p_late),
        disagreement=disagreement(pipeline, onnx, held_out.features, columns),
        seconds=seconds,
    )


def to_onnx(pipeline: Pipeline, columns: Columns, *, name: str) -> bytes:
    """Convert a fitted pipeline to a graph of the inputs and outputs that the module's docstring gives."""
    inputs = [(column, StringTensorType([None, 1])) for column in columns.text]
    inputs.append(("numeric", FloatTensorType([None, len(columns.numeric)])))
    model = convert_sklearn(
        pipeline,
        name=name,  # else skl2onnx draws one at random, and no two builds have the same bytes
        initial_types=inputs,
        target_opset=OPSETS,
        options={id(pipeline): {"zipmap": False}},  # else the probabilities are a sequence of dictionaries
    )
    # skl2onnx lists the opsets in the order of a set of text, which differs from process to process.
    opsets = sorted(model.opset_import, key=lambda opset: str(opset.domain))
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    names = [output.name for output in model.graph.output]
    if names != ["label", "probabilities"]:
        raise ValueError(f"skl2onnx named the outputs {names}, not label and probabilities")
    return bytes(model.SerializeToString(deterministic=True))


def score(onnx: bytes, features: pd.DataFrame, columns: Columns) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Run the graph under onnxruntime: float32 [N, 2], the probabilities of on time and late."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    feeds = {name: features[[name]].to_numpy(dtype=object) for name in columns.text}
    feeds["numeric"] = features[list(columns.numeric)].to_numpy(dtype=np.float32)
    return np.asarray(session.run(["probabilities"], feeds)[0])


def disagreement(pipeline: Pipeline, onnx: bytes, features: pd.DataFrame, columns: Columns) -> float:
    """Greatest absolute difference between scikit-learn's probabilities and the graph's, on a fixed sample."""
    sample = features.sample(AGREEMENT_ROWS, random_state=0)
    return float(np.abs(pipeline.predict_proba(sample) - score(onnx, sample, columns)).max())


def _positions(columns: Columns) -> tuple[list[int], list[int]]:
    # By position, because the graph's input `numeric` holds many columns and has no names for them.
    text = len(columns.text)
    return list(range(text)), list(range(text, text + len(columns.numeric)))
