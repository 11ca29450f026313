"""`triform package`, `inspect`, `verify` and `predict`."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import orjson
import typer
from rich.console import Console
from rich.table import Table

from triform.cli.output import make_table, print_json
from triform.errors import InvalidRequest
from triform.features import Features
from triform.package import BASELINE, MANIFEST, Manifest, ModelPackage
from triform.predictor import Predictor
from triform.repository import ModelRepository, resolve
from triform.settings import Settings
from triform.signature import Array, rows_of

Json = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
Repository = Annotated[str | None, typer.Option("--repository", "-r", help="the model repository [TRIFORM_REPOSITORY]")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="name, name@stable or name/3; or a package's folder")]


def register(app: typer.Typer) -> None:
    for command in (package, inspect, verify, predict):
        app.command()(command)


def given_repository(location: str | None) -> ModelRepository:
    """The repository named on the command line or in the environment; `ConfigurationError` where neither names one."""
    return Settings.from_env(os.environ, repository=location).open_repository()


def find_package(model: str, repository: str | None) -> ModelPackage:
    """The package of a reference in the repository, or of a folder that holds one."""
    if _holds_package(Path(model)):
        return ModelPackage.open(Path(model))
    found = given_repository(repository)
    return found.package(*resolve(found, model))


def _holds_package(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except OSError:  # a name that is too long for a file
        return False


def package(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="the ONNX file; external data beside it is taken along")],
    name: Annotated[str, typer.Option(help="the model's name")],
    to: Annotated[str | None, typer.Option(help="the model repository [TRIFORM_REPOSITORY]")] = None,
    version: Annotated[int | None, typer.Option(help="a positive integer; without it the next")] = None,
    config: Annotated[Path | None, typer.Option(help="the model.toml: columns, labels, threads, batching")] = None,
    samples: Annotated[Path | None, typer.Option(help="sample rows: .json, .jsonl, .csv, .parquet or .npz")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="a JSON file of figures to keep, e.g. {'auc': 0.9}")] = None,
    json: Json = False,
) -> None:
    """Check an ONNX model, record how it answers, and publish it as a version."""
    from triform.packaging import package_model  # brings onnx: only this command waits for it

    done = package_model(
        model,
        name=name,
        repository=given_repository(to),
        version=version,
        config=config,
        samples=samples,
        evaluation=_figures(evaluation) if evaluation else None,
    )
    if json:
        print_json({"ref": done.ref, "digest": done.digest, "notes": done.notes})
        return
    console = Console(soft_wrap=True)
    for note in done.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    console.print(
        f"published {done.ref} (digest {done.digest[:12]}), rows {done.manifest.row_independence.kind}", highlight=False
    )


def _figures(path: Path) -> dict[str, float]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, float])
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"{path}: expected a JSON object of numbers: {error}") from error


def inspect(model: Model, repository: Repository = None, json: Json = False) -> None:
    """Show what a package holds: signature, columns, row independence, golden samples, digests, size."""
    found = find_package(model, repository)
    features = Features(found.manifest.signature, found.manifest.config)
    if json:
        print_json(
            {"manifest": found.manifest, "columns": features.columns, "output_columns": [c.name for c in features.outputs]}
        )
        return
    console = Console(soft_wrap=True)
    console.print(_overview(found))
    console.print(_tensors(features))
    console.print(_columns(features))
    console.print(_files(found))


def _overview(package: ModelPackage) -> Table:
    manifest = package.manifest
    seen = manifest.row_independence
    facts = {
        "description": manifest.config.description,
        "digest": manifest.digest,
        "size": f"{package.size():,} bytes in {len(manifest.files)} files",
        "opset": ", ".join(f"{domain} {number}" for domain, number in manifest.opset.items()),
        "producer": manifest.producer,
        "precision": manifest.precision,
        "ONNX Runtime": f"{manifest.onnxruntime}, {manifest.config.runtime.threads} thread(s), {seen.instruction_set}",
        "rows": _independence(manifest),
        "golden": f"{rows_of(package.golden().inputs)} rows",
        "evaluation": ", ".join(f"{k} {v:g}" for k, v in manifest.evaluation.items()),
    }
    return make_table("", "", rows=[fact for fact in facts.items() if fact[1]], title=manifest.ref, show_header=False)


def _independence(manifest: Manifest) -> str:
    seen = manifest.row_independence
    tried = "; ".join(
        f"{d.threads} thread(s): {d.kind}" + (f", up to {d.max_abs:g} ({d.max_ulp} ulp)" if d.max_ulp else "")
        for d in seen.by_threads
    )
    return f"{seen.kind} ({tried})" + (f" because {'; '.join(seen.reasons)}" if seen.reasons else "")


def _tensors(features: Features) -> Table:
    takes = [("in", f.tensor, ", ".join(c.name for c in f.columns)) for f in features.inputs]
    gives = [("out", t, ", ".join(c.name for c in features.outputs if c.tensor == t)) for t in features.signature.outputs]
    return make_table("", "tensor", "filled from / gives", rows=[*takes, *gives], title="signature")


def _columns(features: Features) -> Table:
    rows = []
    for column in features.outputs:
        shape = "".join(f"[{d if d != -1 else '?'}]" for d in column.row_shape)
        kind = f"{'text' if column.labels else column.tensor.datatype}{shape}"
        rows.append((column.name, kind, ", ".join(column.labels)))
    return make_table("output column", "type", "labels", rows=rows, title="output schema")


def _files(package: ModelPackage) -> Table:
    rows = [(name, f"{entry.size:,}", entry.sha256) for name, entry in sorted(package.manifest.files.items())]
    return make_table("file", "bytes", "sha256", rows=rows, title="files")


def verify(model: Model, repository: Repository = None, json: Json = False) -> None:
    """Check a package in full: digests, no strangers' files, and the golden samples in a process of their own."""
    found = find_package(model, repository)
    found.verify("full")
    if json:
        print_json({"ref": found.manifest.ref, "digest": found.manifest.digest, "ok": True})
    else:
        baseline = "" if BASELINE in found.manifest.files else " (no baseline: it was packaged without --samples)"
        Console(soft_wrap=True).print(f"ok: {found.manifest.ref}, digest {found.manifest.digest}{baseline}", highlight=False)


def predict(
    model: Model,
    input: Annotated[Path, typer.Argument(help="rows: .json, .jsonl, .csv, .parquet or .npz")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="where to: .json, .csv or .parquet; else standard output")
    ] = None,
    repository: Repository = None,
    provider: Annotated[str | None, typer.Option(help="cpu, cuda, tensorrt or auto")] = None,
    json: Json = False,
) -> None:
    """Answer the rows of a file. For files of millions use `python -m batch run`."""
    from triform.rows import read

    found = find_package(model, repository)
    predictor = Predictor.load(found, Settings.from_env(os.environ, provider=provider).runtime())
    features = Features(predictor.signature, found.manifest.config)
    columns = features.to_columns(predictor.run(read(input, features).inputs))
    write = _WRITERS.get(output.suffix.lower()) if output else _write_json if json or not sys.stdout.isatty() else _write_table
    if write is None:
        raise InvalidRequest(f"{output}: it must end in one of {', '.join(_WRITERS)}")
    try:
        write(output, features, columns)
    except OSError as error:
        raise InvalidRequest(f"{output}: cannot be written: {error.strerror or error}") from error
    if output:
        Console(stderr=True).print(f"{len(next(iter(columns.values()), ())):,} rows to {output}", markup=False, highlight=False)


def _records(columns: dict[str, Array]) -> list[dict[str, Any]]:
    """One object a row; NaN is null, because JSON has none. Raises `InvalidRequest` for infinity, which JSON lacks too."""
    for name, values in columns.items():
        if values.dtype.kind == "f" and np.isinf(values).any():
            raise InvalidRequest(f"output '{name}' is infinite in some row, which JSON cannot say: write .parquet instead")
    lists = {name: values.tolist() for name, values in columns.items()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _write_json(path: Path | None, _: Features, columns: dict[str, Array]) -> None:
    content = orjson.dumps(_records(columns)) + b"\n"
    if path:
        path.write_bytes(content)
    else:
        sys.stdout.buffer.write(content)


def _write_parquet(path: Path | None, features: Features, columns: dict[str, Array]) -> None:
    import pyarrow.parquet as pq

    pq.write_table(_arrow(features, columns), path)


def _write_csv(path: Path | None, features: Features, columns: dict[str, Array]) -> None:
    import pyarrow.csv

    nested = [c.name for c in features.outputs if c.row_shape]
    if nested:
        raise InvalidRequest(f"{path}: column '{nested[0]}' holds lists, which CSV cannot: write .json or .parquet")
    pyarrow.csv.write_csv(_arrow(features, columns), path)


def _arrow(features: Features, columns: dict[str, Array]) -> Any:
    import pyarrow as pa

    from triform.arrow import as_arrow, output_schema

    schema = output_schema(features)
    return pa.Table.from_arrays([as_arrow(columns[f.name], f.type) for f in schema], schema=schema)


def _write_table(_: Path | None, __: Features, columns: dict[str, Array]) -> None:
    console = Console()
    console.print(make_table(*columns, rows=itertools.islice(zip(*columns.values(), strict=True), 20)))
    rows = len(next(iter(columns.values()), ()))
    if rows > 20:
        console.print(f"... and {rows - 20:,} rows more; --output FILE writes all", highlight=False)


_WRITERS = {".json": _write_json, ".csv": _write_csv, ".parquet": _write_parquet}
