"""A loaded model: arrays in, arrays out.

    Predictor.load(package) : verify -> session -> warm up on the golden samples
    predict(arrays) : Signature.validate -> run        run(arrays) : chunk and pad -> ONNX Runtime -> rows checked -> arrays

Callers see the rows on axis 0 of every tensor, wherever the graph has them. Thread-safe: one predictor serves all threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from triform import golden
from triform.accelerators import building, engine_folder, for_model
from triform.deadlines import check, watchdog
from triform.errors import (
    ConfigurationError,
    DeadlineExceeded,
    InvalidInput,
    PackageError,
    ResourceExhausted,
    RowsNotKept,
    RunFailed,
)
from triform.package import Independence, Manifest, ModelPackage, Verification
from triform.runtime import RuntimeOptions, brief, open_session, ort, thread_count
from triform.signature import BY_OIP, BY_ONNX, Array, Signature, TensorMetadata, cast, rows_of

log = logging.getLogger(__name__)


class Predictor:
    """Use `Predictor.load`. `load_seconds` has how long verify, session and warmup took."""

    def __init__(self, session: Any, manifest: Manifest, *, threads: int, provider: str) -> None:
        self.manifest = manifest
        self.threads = threads
        self.provider = provider
        self.load_seconds: dict[str, float] = {}
        self._session = session
        self._sample: golden.Golden | None = None  # one golden row, for `check`
        self._outputs = [t.name for t in manifest.signature.outputs]
        self._largest = _largest(manifest, threads)
        self._constants = _constants(session, manifest)
        self._axes = {n: c.batch_axis for n, c in manifest.config.inputs.items()}
        self._axes |= {n: c.batch_axis for n, c in manifest.config.outputs.items()}
        self._run_session = _run if provider == "CPUExecutionProvider" or _has_text(manifest.signature) else run_bound

    @classmethod
    def load(
        cls, package: ModelPackage, options: RuntimeOptions | None = None, *, verification: Verification = "golden"
    ) -> Predictor:
        """Verifies the package, opens the session and warms it up on the golden samples at every shape of `pad_to`.

        Raises `PackageError` (and its kinds) for a package that must not be served, `ProviderUnavailable` for a machine that
        cannot run it as asked.
        """
        options = options or RuntimeOptions()
        manifest = package.manifest
        if manifest.onnxruntime != ort.__version__:
            log.warning(
                "%s was verified with ONNX Runtime %s, this is %s: its golden samples are tried anew",
                manifest.ref, manifest.onnxruntime, ort.__version__,
            )  # fmt: skip
        clock = time.perf_counter()
        package.verify(verification)
        verified = time.perf_counter()
        threads = thread_count(options, manifest.config.runtime.threads)
        with building(engine_folder(options, manifest)):
            session = open_session(package.model_path, for_model(options, manifest), threads)
            opened = time.perf_counter()
            predictor = cls(session, manifest, threads=threads, provider=session.get_providers()[0])
            predictor._warm_up(package.golden())
        predictor.load_seconds = {
            "verify": verified - clock,
            "session": opened - verified,
            "warmup": time.perf_counter() - opened,
        }
        return predictor

    @property
    def signature(self) -> Signature:
        return self.manifest.signature

    @property
    def independence(self) -> Independence:
        """How a row's answer depends on its company, at this predictor's thread count."""
        return self.manifest.row_independence.at(self.threads)

    def predict(self, inputs: Mapping[str, Any], *, deadline: float | None = None) -> dict[str, Array]:
        """Answers arrays of shape [rows, ...] by input name with arrays of shape [rows, ...] by output name.

        `deadline`: a `time.monotonic()` after which the run is ended. Raises `InvalidInput` for what does not fit the
        signature, `RunFailed` where the model raised, `RowsNotKept`, `DeadlineExceeded`, `ResourceExhausted`.
        """
        return self.run(self.signature.validate(inputs), deadline=deadline)

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, most_rows: int | None = None
    ) -> dict[str, Array]:
        """`predict` for arrays that already fit the signature: nothing is checked but the rows that come out.

        `most_rows`: of one run, before it is padded; the package's own is the most.
        """
        rows = rows_of(inputs)
        if rows == 0:
            return self._no_rows()
        batching = self.manifest.config.batching
        largest = self._largest if most_rows is None else min(self._largest, most_rows)
        if rows <= largest:  # in one run, as nearly always
            return self._execute(inputs, rows, next((p for p in batching.pad_to if p >= rows), rows), deadline)
        starts = range(0, rows, largest)
        parts = [{name: array[start : start + largest] for name, array in inputs.items()} for start in starts]
        return joined([self.run(part, deadline=deadline) for part in parts])

    def _execute(self, inputs: Mapping[str, Array], rows: int, size: int, deadline: float | None) -> dict[str, Array]:
        """One run of so many rows, padded to `size`."""
        if size != rows:
            inputs = {name: _padded(array, size) for name, array in inputs.items()}
        outputs = {}
        for name, value in self.run_graph(inputs, deadline=deadline).items():
            axis = self._axes.get(name, 0)
            if not isinstance(value, np.ndarray) or value.ndim <= axis or value.shape[axis] != size:
                raise RowsNotKept(f"output '{name}': {size} row(s) went in, shape {list(np.shape(value))} came out")
            outputs[name] = (np.moveaxis(value, axis, 0) if axis else value)[:rows]
        return outputs

    def run_graph(self, inputs: Mapping[str, Array], *, deadline: float | None = None) -> dict[str, Any]:
        """What the bare graph returns for the rows in one run: constants fed, axes as the graph has them, nothing checked."""
        feed = {name: self._to_graph(name, array) for name, array in inputs.items()}
        return dict(zip(self._outputs, self._run(feed | self._constants, deadline), strict=True))

    def _to_graph(self, name: str, array: Array) -> Array:
        axis = self._axes.get(name, 0)
        return np.ascontiguousarray(np.moveaxis(array, 0, axis) if axis else array)

    def _run(self, feed: dict[str, Array], deadline: float | None) -> list[Any]:
        options = ort.RunOptions() if deadline is not None else None
        try:
            if deadline is None:
                return self._run_session(self._session, self._outputs, feed, None)
            check(deadline, "the model ran")
            with watchdog.guard(options, deadline):
                return self._run_session(self._session, self._outputs, feed, options)
        except DeadlineExceeded:
            raise
        except MemoryError as error:
            raise ResourceExhausted("memory ran out while the model ran; send fewer rows at a time") from error
        except Exception as error:  # the binding raises a dozen unrelated classes
            if options is not None and options.terminate:
                raise DeadlineExceeded("the model was stopped at the deadline") from error
            if "Failed to allocate memory" in str(error):
                raise ResourceExhausted("memory ran out while the model ran; send fewer rows at a time") from error
            raise RunFailed(f"the model raised: {brief(error)}") from error

    def check(self, *, deadline: float | None = None) -> None:
        """Runs one golden row, cheaply, to see whether the session still answers as it did when it was loaded.

        Raises `GoldenMismatch`, and as `predict` does.
        """
        if self._sample is not None:
            self._compare(self._sample.outputs, self.run(self._sample.inputs, deadline=deadline))

    def _compare(self, recorded: Mapping[str, Array], got: Mapping[str, Array]) -> None:
        known = self.manifest.tolerances
        golden.compare(recorded, got, known.get(self.provider, known.get("CPUExecutionProvider", {})))

    def _no_rows(self) -> dict[str, Array]:
        """Empty outputs: many graphs fail on zero rows, and there is nothing to ask them."""
        return {t.name: t.no_rows() for t in self.signature.outputs}

    def _warm_up(self, samples: golden.Golden) -> None:
        """Runs the golden samples, and each shape of `pad_to`; raises `GoldenMismatch` where an answer left its tolerance."""
        try:
            inputs = self.signature.validate(samples.inputs)
            outputs = self.run(inputs)
            for size in self.manifest.config.batching.pad_to:
                self.run({n: _padded(a[:1], size) for n, a in inputs.items()})
        except (RunFailed, InvalidInput, ValueError, KeyError) as error:
            raise PackageError(f"{self.manifest.ref}: the golden samples do not run: {error}") from error
        self._compare(samples.outputs, outputs)
        self._sample = golden.Golden(_first_row(inputs), _first_row(samples.outputs))


def joined(runs: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The answers of runs one after another, as one. Raises `RowsNotKept` where they differ in more than their rows."""
    if len(runs) == 1:
        return dict(runs[0])
    outputs = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        if len(shapes := {value.shape[1:] for value in values}) > 1:
            first, second, *_ = sorted(shapes)
            raise RowsNotKept(
                f"output '{name}': its rows differ in shape ({list(first)} and {list(second)}), so they make no tensor"
            )
        outputs[name] = np.concatenate(values)
    return outputs


def _run(session: Any, outputs: list[str], feed: dict[str, Array], options: Any) -> list[Any]:
    values: list[Any] = session.run(outputs, feed, options)
    return values


def run_bound(session: Any, outputs: list[str], feed: dict[str, Array], options: Any) -> list[Any]:
    """One run through an IO binding: inputs are copied to the device once, outputs come back once, nothing in between."""
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_cpu_input(name, array)
    for name in outputs:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding, options)
    values: list[Any] = binding.copy_outputs_to_cpu()
    return values


def _first_row(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """A copy: the other rows are not kept for it."""
    return {name: array[:1].copy() for name, array in arrays.items()}


def _largest(manifest: Manifest, threads: int) -> int:
    """The most rows of one run. Those of a `dependent` model run alone, whoever asks: that is the only answer that is theirs."""
    batching = manifest.config.batching
    if manifest.row_independence.at(threads) == "dependent":
        return 1
    return batching.pad_to[-1] if batching.pad_to else batching.max_rows


def _padded(array: Array, size: int) -> Array:
    """The array with its last row repeated up to `size` rows: values that the model is known to take."""
    short = size - array.shape[0]
    return array if short == 0 else np.concatenate([array, np.repeat(array[-1:], short, axis=0)])


def _constants(session: Any, manifest: Manifest) -> dict[str, Array]:
    """The inputs that model.toml fixes, as arrays of the graph's dtype. Raises `ConfigurationError` for one that does not fit."""
    types = {node.name: node.type for node in session.get_inputs()}
    given = {name: i.constant for name, i in manifest.config.inputs.items() if i.constant is not None}
    try:
        return {name: cast(value, TensorMetadata(name, BY_ONNX[types[name]].oip, ())) for name, value in given.items()}
    except InvalidInput as error:
        raise ConfigurationError(f"model.toml: inputs.{error.input}.constant: {error}") from error


def _has_text(signature: Signature) -> bool:
    """Text lives in CPU memory only; a graph that touches it is run without binding."""
    return any(BY_OIP[t.datatype].oip == "BYTES" for t in (*signature.inputs, *signature.outputs))
