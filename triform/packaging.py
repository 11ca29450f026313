"""Building a model package: from an ONNX file to a verified version in a repository.

    file -> inspect the graph -> stage (ZipMap dropped, external data copied) -> sample rows -> signature -> golden outputs
         -> row independence -> manifest -> full verification in a child process -> publish, whole or not at all

Nothing of this is on the online path: it needs triform[cli].
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from triform import baseline, golden, graph, independence, layout
from triform.config import ModelConfig, RuntimeNeeds, read_config
from triform.errors import ConfigurationError, InvalidInput, RowsNotKept, RunFailed, UnsupportedModel, VersionExists
from triform.features import Features
from triform.golden import Golden, Tolerance
from triform.package import (
    BASELINE,
    CONFIG,
    GOLDEN,
    MANIFEST,
    MODEL,
    Deviation,
    Manifest,
    ModelPackage,
    RowIndependence,
    file_entry,
)
from triform.predictor import Predictor
from triform.repository import VERSION, ModelRepository, Ref, check_name
from triform.rows import Rows, read
from triform.runtime import RuntimeOptions, available_cpus, open_session, ort
from triform.samples import invent
from triform.signature import ROWS, Array, Signature, TensorMetadata, datatype_of_onnx, rows_of

GOLDEN_ROWS: Final = 32
MADE_ROWS: Final = 16
GOLDEN_BYTES: Final = 32 << 20
SECONDS_FOR_GOLDEN: Final = 2.0  # to run each golden row alone, once

# What kernels may differ by between machines, by provider and dtype. CUDA multiplies float32 as TF32 unless told otherwise.
BASE_TOLERANCES: Final = {
    "CPUExecutionProvider": {"float64": (1e-9, 1e-7), "float32": (1e-6, 1e-5), "float16": (1e-3, 1e-2)},
    "CUDAExecutionProvider": {"float64": (1e-9, 1e-7), "float32": (1e-4, 1e-3), "float16": (1e-2, 2e-2)},
    "TensorrtExecutionProvider": {"float64": (1e-9, 1e-7), "float32": (1e-3, 1e-2), "float16": (1e-2, 5e-2)},
}


class Packaged(msgspec.Struct, frozen=True):
    """What was published. `notes` say in plain words what the packager changed or found."""

    ref: str
    digest: str
    notes: list[str]
    manifest: Manifest


def package_model(
    model: Path,
    *,
    name: str,
    repository: ModelRepository,
    version: int | None = None,
    config: Path | None = None,
    samples: Path | None = None,
    evaluation: Mapping[str, float] | None = None,
) -> Packaged:
    """Publishes `model` as a version of `name`: the given one, or the next.

    `config` is the model.toml, `samples` a file of rows (see `rows.py`), `evaluation` figures to keep in the manifest. Raises
    `UnsupportedModel` or `ConfigurationError` with what to do, `UnsafePackage`, `VersionExists`, `StoreError`, and
    `ResourceExhausted` where the samples need more memory than there is.
    """
    check_name(name)
    if version is not None and not VERSION.fullmatch(str(version)):
        raise ConfigurationError(f"version: expected a positive integer of up to nine digits, got {version}")
    if version in repository.versions(name):
        raise VersionExists(f"'{name}' already has a version {version}, and versions never change: publish the next")
    if version in repository.pruned(name):
        raise VersionExists(f"version {version} of '{name}' was pruned, and no number is used twice: publish the next")
    settings = read_config(config) if config else ModelConfig()
    with repository.staging(name) as folder:
        build = _Build(folder, settings)
        build.stage(model, config)
        draft = build.manifest(name, samples, evaluation or {})
        return _publish(repository, folder, draft, version, build.notes)


def _publish(repository: ModelRepository, folder: Path, draft: Manifest, version: int | None, notes: list[str]) -> Packaged:
    """Seals the manifest with its version number and publishes; without a fixed number it takes the next that is free."""
    verified, refused = False, 0
    while True:
        number = version or max([refused, *repository.versions(draft.name), *repository.pruned(draft.name)]) + 1
        manifest = msgspec.structs.replace(draft, version=number).sealed()
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        if not verified:
            ModelPackage.open(folder).verify("full")
            verified = True
        try:
            repository.publish(folder, draft.name, number)
        except VersionExists:
            if version is not None:
                raise
            refused = number  # taken meanwhile, or by something that is no version
            continue
        return Packaged(str(Ref(draft.name, version=number)), manifest.digest, notes, manifest)


class _Build:
    """One package in the making, in its staging folder."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.config = config
        self.notes: list[str] = []

    def stage(self, source: Path, config_file: Path | None) -> None:
        """Copies model, weights and model.toml into the folder, and tries in a child process whether the model loads at all."""
        self.model = graph.read_model(source)
        external = graph.external_files(self.model, source.parent)
        for name in external:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.parent / name, self.folder / name)
        zipmaps = graph.drop_zipmap(self.model)
        if zipmaps:
            (self.folder / MODEL).write_bytes(self.model.SerializeToString(deterministic=True))
        else:
            shutil.copyfile(source, self.folder / MODEL)
        for zipmap in zipmaps:
            self._label_columns(zipmap)
        if config_file is not None:
            shutil.copyfile(config_file, self.folder / CONFIG)
        golden.load_in_child(self.folder / MODEL)

    def _label_columns(self, zipmap: graph.ZipMap) -> None:
        """Names the tensor's columns after the ZipMap's labels, unless model.toml does."""
        self.notes.append(
            f"dropped ZipMap: output '{zipmap.output}' is now a tensor [rows, {len(zipmap.labels)}] (a column for each of "
            f"{', '.join(zipmap.labels[:6])}{', ...' if len(zipmap.labels) > 6 else ''})"
        )
        given = self.config.output(zipmap.output)
        if not given.columns and not given.drop:
            columns = tuple(f"{zipmap.output}_{label}" for label in zipmap.labels)
            outputs = {**self.config.outputs, zipmap.output: msgspec.structs.replace(given, columns=columns)}
            self.config = msgspec.structs.replace(self.config, outputs=outputs)

    def manifest(self, name: str, sample_file: Path | None, evaluation: Mapping[str, float]) -> Manifest:
        """Tries the model out and describes it; the version and digest are filled in when it is published."""
        session = open_session(self.folder / MODEL, RuntimeOptions(), self._threads(self.config.runtime))
        inputs = layout.input_metadata(session, self.config)
        self._fix_rows(inputs)
        rows, runs = self._samples(name, session, inputs, sample_file)
        signature = Signature(inputs.tensors, layout.output_metadata(session, self.config, inputs, runs))
        Features(signature, self.config)  # the mapping must fit what the model really returns
        draft = self._draft(name, signature, evaluation)
        recorded, found = self._try_company(draft, rows.inputs)
        golden.write(self.folder / GOLDEN, recorded)
        if rows.columns:
            (self.folder / BASELINE).write_bytes(msgspec.json.encode(baseline.baseline(rows.columns), order="sorted"))
        kept = {t.name for t in signature.outputs}
        row_independence = self._conclude(found, graph.mixing_nodes(self.model, inputs.batch_dims, kept))
        files = {str(p.relative_to(self.folder)): file_entry(p) for p in sorted(self.folder.rglob("*")) if p.is_file()}
        return msgspec.structs.replace(
            draft, row_independence=row_independence, tolerances=_tolerances(row_independence.tolerance), files=files
        )

    def _threads(self, runtime: RuntimeNeeds) -> int:
        if runtime.threads > available_cpus():
            raise ConfigurationError(
                f"model.toml: runtime.threads: {runtime.threads}, but this machine has {available_cpus()} CPU(s): "
                "package it where its rows can be tried on that many"
            )
        return runtime.threads

    def _fix_rows(self, inputs: layout.Inputs) -> None:
        """A graph fixed to B rows runs at B rows, always: that is padding to one size."""
        size = inputs.fixed_rows
        if size is None:
            return
        if self.config.batching.pad_to not in ((), (size,)):
            raise ConfigurationError(
                f"model.toml: batching.pad_to: the graph is fixed to {size} row(s); export it with a dynamic batch axis"
            )
        self.notes.append(f"the graph is fixed to {size} row(s): every run is padded to that")
        batching = msgspec.structs.replace(self.config.batching, pad_to=(size,))
        self.config = msgspec.structs.replace(self.config, batching=batching)

    def _samples(
        self, name: str, session: Any, inputs: layout.Inputs, file: Path | None
    ) -> tuple[Rows, list[tuple[int, dict[str, Array]]]]:
        """Sample rows, given or made up, all of which the bare graph takes, and what it returns for two numbers of them."""
        outputs = tuple(
            TensorMetadata(n.name, datatype_of_onnx(n.type, n.name).oip, (ROWS,))
            for n in layout.kept_outputs(session, self.config)
        )
        bare = Predictor(
            session, self._draft(name, Signature(inputs.tensors, outputs), {}), threads=1, provider="CPUExecutionProvider"
        )
        sizes = (inputs.fixed_rows,) if inputs.fixed_rows else (3, 2)

        def run(arrays: Mapping[str, Array], start: int, size: int) -> dict[str, Array]:
            at = np.arange(start, start + size)
            return bare.run_graph({k: np.take(a, at, axis=0, mode="wrap") for k, a in arrays.items()})

        def try_out(arrays: Mapping[str, Array]) -> list[tuple[int, dict[str, Array]]]:
            for start in range(sizes[0], rows_of(arrays), sizes[0]):
                run(arrays, start, sizes[0])  # the model takes every row, not just the first ones
            return [(n, run(arrays, 0, n)) for n in sizes]

        if file is None:
            arrays, runs = invent(inputs.tensors, MADE_ROWS, try_out)
            self.notes.append("no --samples: golden rows and row independence were tried on made-up rows; real ones tell more")
            return Rows(arrays, {}), runs
        rows = read(file, Features(Signature(inputs.tensors, ()), self.config.without_outputs()))
        if not len(rows):
            raise InvalidInput(f"{file}: no rows; give a few dozen that look like production")
        rows = Rows(_spread(rows.inputs, GOLDEN_ROWS), rows.columns)
        try:
            return rows, try_out(rows.inputs)
        except RunFailed as error:
            raise UnsupportedModel(f"the model does not take the rows of {file}: {error}") from error

    def _draft(self, name: str, signature: Signature, evaluation: Mapping[str, float]) -> Manifest:
        untried = RowIndependence("exact", Tolerance(0.0, 0.0), ())
        return Manifest(
            name=name,
            version=1,
            signature=signature,
            config=self.config,
            opset={o.domain or "ai.onnx": o.version for o in self.model.opset_import},
            producer=f"{self.model.producer_name} {self.model.producer_version}".strip(),
            onnxruntime=ort.__version__,
            precision=graph.precision(self.model),
            row_independence=untried,
            tolerances={},
            evaluation=dict(evaluation),
            files={},
        )

    def _try_company(self, draft: Manifest, inputs: Mapping[str, Array]) -> tuple[Golden, list[Deviation]]:
        """The golden rows with their answers, and how far those move in company at the package's, 1 and 2 threads."""
        packaged = self.config.runtime.threads
        run = self._runner(draft, packaged)
        chosen = _choose(inputs, run)
        try:
            reference = independence.alone(run, chosen)
        except RowsNotKept as error:
            raise UnsupportedModel(f"{error}; pad them in the graph, or leave the output out with `drop = true`") from error
        if independence.difference(reference, independence.alone(run, chosen)).kind == "dependent":
            why = ", ".join(graph.random_nodes(self.model)) or "no random operator was found"
            raise UnsupportedModel(
                f"the same rows get different answers from one run to the next ({why}): make the model deterministic"
            )
        counts = [packaged, *(n for n in (1, 2) if n != packaged and n <= available_cpus())]
        found = [independence.deviation(self._runner(draft, n) if n != packaged else run, chosen, reference, n) for n in counts]
        return Golden(chosen, reference), found

    def _runner(self, draft: Manifest, threads: int) -> independence.Run:
        session = open_session(self.folder / MODEL, RuntimeOptions(), threads)
        return Predictor(session, draft, threads=threads, provider="CPUExecutionProvider").run

    def _conclude(self, found: list[Deviation], reasons: list[str]) -> RowIndependence:
        """What was seen at the package's thread count, unless the graph says that rows mix."""
        kind = "dependent" if reasons else found[0].kind
        bound = independence.tolerance(found)
        if kind == "dependent":
            why = "; ".join(reasons) or f"answers moved by up to {found[0].max_abs:g} with the rows beside them"
            fixed = self.config.batching.pad_to
            if fixed and fixed[0] > 1:
                raise UnsupportedModel(
                    f"rows depend on one another ({why}) and cannot run alone, because every run has {fixed[0]} rows or more: "
                    "export the graph with a dynamic batch axis, and leave out batching.pad_to"
                )
            self.notes.append(
                f"rows depend on one another ({why}): they are scored one by one, never batched with strangers' rows"
            )
            bound = Tolerance(0.0, 0.0)  # each row runs alone: there is nothing to allow for
        return RowIndependence(kind, bound, tuple(found), tuple(reasons), instruction_set=independence.instruction_set())


def _choose(inputs: Mapping[str, Array], run: independence.Run) -> dict[str, Array]:
    """Evenly spaced rows: at most GOLDEN_ROWS, fewer of a model that is large or slow (at least 4 where there are so many)."""
    started = time.perf_counter()
    run({n: a[:1] for n, a in inputs.items()})
    seconds = time.perf_counter() - started
    row_bytes = sum(a[:1].nbytes for a in inputs.values())
    most = max(4, min(GOLDEN_ROWS, int(SECONDS_FOR_GOLDEN / max(seconds, 1e-6)), GOLDEN_BYTES // max(row_bytes, 1)))
    return _spread(inputs, most)


def _spread(inputs: Mapping[str, Array], most: int) -> dict[str, Array]:
    """At most that many rows, evenly spaced."""
    rows = rows_of(inputs)
    at = np.unique(np.linspace(0, rows - 1, min(rows, most)).astype(np.intp))
    return {n: a[at] for n, a in inputs.items()}


def _tolerances(seen: Tolerance) -> dict[str, dict[str, Tolerance]]:
    """The base tolerances, widened to what this model was seen to do."""
    return {
        provider: {dtype: Tolerance(max(a, seen.atol), max(r, seen.rtol)) for dtype, (a, r) in table.items()}
        for provider, table in BASE_TOLERANCES.items()
    }
