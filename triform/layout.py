"""A model's signature, from what its graph declares, what model.toml says, and above all what a run returns.

    session + config -> input_metadata -> sample run with two row counts -> output_metadata -> Signature

Declared shapes may lie (rank 2 declared, rank 3 returned), so outputs get the shape that came. Anything without rows on one
axis is refused with what to write into model.toml.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from triform.config import InputConfig, ModelConfig
from triform.errors import ConfigurationError, UnsupportedModel
from triform.signature import ROWS, Array, Dim, TensorMetadata, datatype_of_onnx

NAMELESS: Final = (None, "", "?")  # dynamic dimensions that are not one and the same ("?" is Paddle's)


class Inputs(NamedTuple):
    """`fixed_rows`: the batch size that the graph is fixed to, or None. `batch_dims`: what the graph calls its batch axis."""

    tensors: tuple[TensorMetadata, ...]
    fixed_rows: int | None
    batch_dims: set[str]


def input_metadata(session: Any, config: ModelConfig) -> Inputs:
    """The inputs as callers see them: constants left out, rows on axis 0. Raises `UnsupportedModel` or `ConfigurationError`."""
    nodes = session.get_inputs()
    _known("inputs", config.inputs, [n.name for n in nodes])
    tensors, batch = [], {}
    for node in nodes:
        given = config.input(node.name)
        datatype = datatype_of_onnx(node.type, node.name).oip
        if given.constant is not None:
            continue
        shape = _declared(node, given)
        batch[node.name] = shape[given.batch_axis]
        rest = [d for axis, d in enumerate(shape) if axis != given.batch_axis]
        tensors.append(TensorMetadata(node.name, datatype, (ROWS, *rest)))
    if not tensors:
        raise UnsupportedModel("the model has no input left to feed: every one is a constant, or it takes none")
    names = {d for d in batch.values() if isinstance(d, str)}
    renamed = (TensorMetadata(t.name, t.datatype, (ROWS, *_without(t, names))) for t in tensors)
    return Inputs(tuple(renamed), _fixed_rows(batch), names)


def _declared(node: Any, given: InputConfig) -> list[Dim]:
    """The graph's shape for an input, or model.toml's, checked to have a batch axis."""
    if given.shape is not None:
        shape: list[Dim] = list(given.shape)
    else:
        shape = [-1 if d in NAMELESS else d for d in node.shape]
    if not shape:
        raise UnsupportedModel(
            f"input '{node.name}' is a scalar: it has no axis for rows. Fix its value in model.toml:\n"
            f"[inputs.{node.name}]\nconstant = ..."
        )
    if not 0 <= given.batch_axis < len(shape):
        raise ConfigurationError(
            f"model.toml: inputs.{node.name}.batch_axis: {given.batch_axis}, but the input has {len(shape)} axes"
        )
    return shape


def _without(tensor: TensorMetadata, batch_dims: set[str]) -> Iterable[Dim]:
    """The row's shape. A dimension named like the batch axis is refused."""
    for dim in tensor.row_shape:
        if dim in batch_dims:
            raise UnsupportedModel(
                f"input '{tensor.name}' has the batch dimension '{dim}' on a second axis. If its rows are on another axis, "
                f"say so in model.toml:\n[inputs.{tensor.name}]\nbatch_axis = ..."
            )
        yield f"{dim}_" if dim == ROWS else dim


def _fixed_rows(batch: Mapping[str, Dim]) -> int | None:
    """The number of rows that every input is fixed to, or None if they are free."""
    sizes = {d if isinstance(d, int) and d >= 0 else None for d in batch.values()}
    if len(sizes) > 1:
        odd = ", ".join(f"{name}: {dim}" for name, dim in batch.items())
        raise UnsupportedModel(
            f"the inputs disagree about the batch axis ({odd}). If the rows of one are on another axis, say so in model.toml:\n"
            "[inputs.NAME]\nbatch_axis = 1\nA stateful model's state is an ordinary input and output of this kind."
        )
    return sizes.pop()


def output_metadata(
    session: Any, config: ModelConfig, inputs: Inputs, runs: Sequence[tuple[int, Mapping[str, Array]]]
) -> tuple[TensorMetadata, ...]:
    """The outputs as callers see them, from raw runs of (rows, output arrays). Raises `UnsupportedModel` for one without rows."""
    free = any(not isinstance(d, int) or d < 0 for t in inputs.tensors for d in t.row_shape)
    return tuple(_output(node, config.output(node.name).batch_axis, free, runs) for node in kept_outputs(session, config))


def kept_outputs(session: Any, config: ModelConfig) -> list[Any]:
    """The graph's outputs but for those that model.toml drops, their types checked."""
    nodes = session.get_outputs()
    _known("outputs", config.outputs, [n.name for n in nodes])
    kept = [n for n in nodes if not config.output(n.name).drop]
    for node in kept:
        datatype_of_onnx(node.type, node.name)
    if not kept:
        raise UnsupportedModel("model.toml drops every output")
    return kept


def _output(node: Any, axis: int, free: bool, runs: Sequence[tuple[int, Mapping[str, Array]]]) -> TensorMetadata:
    shapes = [np.shape(arrays[node.name]) for _, arrays in runs]
    for (rows, _), shape in zip(runs, shapes, strict=True):
        if len(shape) <= axis or shape[axis] != rows:
            raise UnsupportedModel(_no_rows(node.name, axis, runs, shapes))
    came = [[d for i, d in enumerate(shape) if i != axis] for shape in shapes]
    declared = [-1 if d in NAMELESS else d for i, d in enumerate(node.shape or ()) if i != axis]
    if len(declared) != len(came[0]):
        declared = [-1] * len(came[0])  # the declared rank lies: go by what came
    row_shape: list[Dim] = []
    for i, said in enumerate(declared):
        sizes = {shape[i] for shape in came}
        fixed = len(sizes) == 1 and (not free or (isinstance(said, int) and said in sizes))
        row_shape.append(came[0][i] if fixed else said if isinstance(said, str) else -1)
    return TensorMetadata(node.name, datatype_of_onnx(node.type, node.name).oip, (ROWS, *row_shape))


def _no_rows(name: str, axis: int, runs: Sequence[tuple[int, Any]], shapes: Sequence[tuple[int, ...]]) -> str:
    told = " and ".join(f"{list(shape)} for {rows} row(s)" for (rows, _), shape in zip(runs, shapes, strict=True))
    ranks = {len(s) for s in shapes}
    found = [i for i in range(min(ranks)) if all(s[i] == rows for (rows, _), s in zip(runs, shapes, strict=True))]
    advice = (
        f"its rows are on axis {found[0]}: say so in model.toml:\n[outputs.{name}]\nbatch_axis = {found[0]}"
        if found and len(runs) > 1
        else "an answer must belong to a row. If the inputs have their rows on another axis, say so in model.toml:\n"
        f"[inputs.NAME]\nbatch_axis = 1\nIf this output is no answer to a row, leave it out:\n[outputs.{name}]\ndrop = true"
    )
    return f"output '{name}' has no rows on axis {axis} (shape {told}): {advice}"


def _known(table: str, given: Iterable[str], there: list[str]) -> None:
    for name in given:
        if name not in there:
            raise ConfigurationError(
                f"model.toml: {table}.{name}: the model has no such {table[:-1]} (it has {', '.join(there)})"
            )
