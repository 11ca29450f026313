"""The data and models of `benchmarks/batch.py`, made once and kept under build/bench.

flights      the example's year of flights ten times over, 12 files; logistic regression over 12 numbers and 3 texts
floats-mlp   2M rows x 30 float32 in 8 files; a perceptron of 64 and 32 units
floats-trees the same rows; gradient boosting, 200 trees of depth 3
tpch         TPC-H line items, 8 files; logistic regression over 4 decimals and 2 texts
"""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.environments import environment
from benchmarks.peers.task import Task
from triform.features import Features
from triform.package import ModelPackage
from triform.packaging import package_model
from triform.repository import open_repository

FLIGHTS = 336_776
FLOATS = [f"f{i:02}" for i in range(30)]
ROW_GROUP = 128 * 1024
DUCKDB = ["duckdb==1.5.5", "duckdb-extension-tpch==1.5.5"]  # an environment of its own: the extension pins its DuckDB
LINE_ITEMS_AT_SCALE_1 = 6_001_215


class DataSet(NamedTuple):
    """Rows to score, and the package to score them with."""

    name: str
    title: str
    files: list[Path]
    package: ModelPackage
    repository: Path
    key: tuple[str, ...]
    keep: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return sum(pq.read_metadata(file).num_rows for file in self.files)

    def task(self, output: Path, result: Path, workers: int) -> Task:
        manifest = self.package.manifest
        features = Features(manifest.signature, manifest.config)
        return Task(
            files=[str(file) for file in self.files],
            output=str(output),
            result=str(result),
            model=str(self.package.model_path),
            ref=manifest.ref,
            repository=str(self.repository.resolve()),
            inputs={f.tensor.name: [c.name for c in f.columns] for f in features.inputs},
            text=[f.tensor.name for f in features.inputs if f.tensor.datatype == "BYTES"],
            required=[c.name for f in features.inputs for c in f.columns if c.null == "dead-letter"],
            outputs={c.name: (c.tensor.name, c.position, c.tensor.dtype.name) for c in features.outputs},
            key=list(self.key),
            keep=list(self.keep),
            workers=workers,
        )


def flights(root: Path, rows: int | None) -> DataSet:
    from examples.flights import build

    build.build(root / "flights")
    copies = max(1, round((rows or 10 * FLIGHTS) / FLIGHTS))

    def make(folder: Path) -> None:
        for month in sorted((root / "flights/input").glob("month=*")):
            table = pq.read_table(month / "part-0.parquet", partitioning=None)
            again = [table.set_column(0, "id", pc.add(table["id"], i * FLIGHTS)) for i in range(copies)]
            pq.write_table(
                pa.concat_tables(again), folder / f"{month.name[6:]}.parquet", compression="zstd", row_group_size=ROW_GROUP
            )

    repository = root / "flights/repository"
    return DataSet(
        "flights",
        f"flights, {copies} times over: logistic regression, 12 numbers and 3 texts",
        _files(root / f"bench/flights-x{copies}", make),
        open_repository(repository).package("flight-delay", 1),
        repository,
        ("id",),
        ("carrier",),
    )


def floats_mlp(root: Path, rows: int | None) -> DataSet:
    from sklearn.neural_network import MLPRegressor

    model = MLPRegressor(hidden_layer_sizes=(64, 32), max_iter=10, random_state=0)
    return _floats(root, rows or 2_000_000, "floats-mlp", "perceptron of 64 and 32 units", model)


def floats_trees(root: Path, rows: int | None) -> DataSet:
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(n_estimators=200, max_depth=3, subsample=0.5, random_state=0)
    return _floats(root, rows or 2_000_000, "floats-trees", "200 trees of depth 3", model)


def _floats(root: Path, rows: int, name: str, what: str, model: Any) -> DataSet:
    def make(folder: Path) -> None:
        for i, ids in enumerate(np.array_split(np.arange(rows), 8)):
            columns = {"id": ids, **dict(zip(FLOATS, _random(i, len(ids)).T, strict=True))}
            pq.write_table(
                pa.table(columns), folder / f"{i}.parquet", compression="zstd", row_group_size=ROW_GROUP, use_dictionary=False
            )

    def convert() -> bytes:
        from skl2onnx import to_onnx

        values = _random(1_000, 3_000)
        target = values[:, 0] * values[:, 1] + np.sin(values[:, 2]) + values[:, 3:].mean(axis=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ten rounds do not converge, and need not
            model.fit(values, target)
        onnx: bytes = to_onnx(model, values[:1], target_opset={"": 17, "ai.onnx.ml": 3}).SerializeToString()
        return onnx

    sample = pa.table(dict(zip(FLOATS, _random(2_000, 64).T, strict=True)))
    config = f'[inputs.X]\ncolumns = {json.dumps(FLOATS)}\n[outputs.variable]\ncolumns = ["score"]\n[runtime]\nthreads = 1\n'
    repository, package = _package(root, name, convert, config, sample)
    title = f"{rows / 1e6:g}M rows x 30 floats: {what}"
    return DataSet(name, title, _files(root / f"bench/floats-{rows}", make), package, repository, ("id",))


def _random(seed: int, rows: int) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, len(FLOATS)), dtype=np.float32)


TPCH_NUMBERS = ["l_quantity", "l_extendedprice", "l_discount", "l_tax"]
TPCH_TEXTS = ["l_returnflag", "l_shipmode"]


def tpch(root: Path, rows: int | None) -> DataSet:
    scale = round((rows or LINE_ITEMS_AT_SCALE_1) / LINE_ITEMS_AT_SCALE_1, 3)
    files = _files(root / f"bench/tpch-{scale:g}", lambda folder: _generate(root, folder, scale))

    def sample(count: int) -> pa.Table:
        return pq.ParquetFile(files[0]).read_row_group(0).slice(0, count)

    repository, package = _package(
        root, "tpch", lambda: _late_items(sample(20_000)), TPCH_CONFIG, sample(64).select([*TPCH_TEXTS, *TPCH_NUMBERS])
    )
    title = f"TPC-H line items, scale {scale:g}: logistic regression, 4 decimals and 2 texts"
    return DataSet("tpch", title, files, package, repository, ("l_orderkey", "l_linenumber"))


TPCH_CONFIG = f"""
[inputs.l_returnflag]
columns = ["l_returnflag"]
[inputs.l_shipmode]
columns = ["l_shipmode"]
[inputs.numeric]
columns = {json.dumps(TPCH_NUMBERS)}
[outputs.label]
columns = ["late"]
[outputs.probabilities]
columns = ["p_in_time", "p_late"]
[runtime]
threads = 1
"""


def _generate(root: Path, folder: Path, scale: float) -> None:
    """DuckDB's TPC-H generator, in an environment of its own."""
    python = environment(root / "bench/duckdb-venv", DUCKDB)
    subprocess.run([python, str(Path(__file__).with_name("generate_tpch.py")), str(folder), str(scale)], check=True, timeout=300)


def _late_items(table: pa.Table) -> bytes:
    """A model of whether an item is received after the promised day."""
    import pandas as pd
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType
    from sklearn.compose import ColumnTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    late = pc.greater(table["l_receiptdate"], table["l_commitdate"]).to_numpy().astype(np.int64)
    text = {name: table[name].to_numpy().astype(object) for name in TPCH_TEXTS}
    numeric = {name: table[name].cast(pa.float64()).to_numpy().astype(np.float32) for name in TPCH_NUMBERS}
    encode = ColumnTransformer(
        [("text", OneHotEncoder(handle_unknown="ignore"), [0, 1]), ("numbers", StandardScaler(), [2, 3, 4, 5])],
        sparse_threshold=1.0,
    )
    pipeline = make_pipeline(encode, LogisticRegression(max_iter=300)).fit(pd.DataFrame(text | numeric), late)
    inputs = [*((name, StringTensorType([None, 1])) for name in TPCH_TEXTS), ("numeric", FloatTensorType([None, 4]))]
    onnx: bytes = convert_sklearn(
        pipeline, initial_types=inputs, target_opset={"": 17, "ai.onnx.ml": 3}, options={id(pipeline): {"zipmap": False}}
    ).SerializeToString()
    return onnx


DATA_SETS: Mapping[str, Callable[[Path, int | None], DataSet]] = {
    "flights": flights,
    "floats-mlp": floats_mlp,
    "floats-trees": floats_trees,
    "tpch": tpch,
}


def _files(folder: Path, make: Callable[[Path], None]) -> list[Path]:
    """The folder's files; made first, under another name until they are complete, if it is not there."""
    if not folder.exists():
        print(f"making {folder}", flush=True)
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return sorted(folder.resolve().glob("*.parquet"))


def _package(root: Path, name: str, convert: Callable[[], bytes], config: str, samples: pa.Table) -> tuple[Path, ModelPackage]:
    """Version 1 of the model in the benchmark's repository, packaged as any other is."""
    location = root / "bench/repository"
    repository = open_repository(location)
    if not repository.versions(name):
        print(f"training and packaging {name}", flush=True)
        drafts = root / "bench/drafts" / name
        drafts.mkdir(parents=True, exist_ok=True)
        (drafts / "model.onnx").write_bytes(convert())
        (drafts / "model.toml").write_text(config)
        pq.write_table(samples, drafts / "samples.parquet")
        package_model(
            drafts / "model.onnx",
            name=name,
            repository=repository,
            config=drafts / "model.toml",
            samples=drafts / "samples.parquet",
        )
    return location, repository.package(name, 1)
