"""What can be read off an ONNX graph before it is run: external data, ZipMap, nodes that mix rows, precision.

Everything here looks into subgraphs (If, Loop, Scan) and functions too. Needs the `onnx` package (triform[cli]).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final, NamedTuple

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from triform.errors import InvalidRequest, UnsafePackage, UnsupportedModel
from triform.package import FILE, RESERVED, check_no_links

MAX_MODEL_BYTES: Final = 2**31 - 1  # what protobuf can parse
RANDOM_OPS: Final = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
REDUCTIONS: Final = frozenset(
    {"ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
     "ReduceSumSquare"}
)  # fmt: skip
OPSET: Final = 9  # of the Identity in a model that had no standard operator
ALONG_AXIS: Final = {"Softmax": -1, "LogSoftmax": -1, "Hardmax": -1, "ArgMax": 0, "ArgMin": 0, "CumSum": None, "TopK": -1}


class ZipMap(NamedTuple):
    """A ZipMap that was taken off: its output's name now stands for the tensor, whose columns are the labels."""

    output: str
    labels: tuple[str, ...]


def read_model(path: Path) -> ModelProto:
    """The graph without its external data. Raises `UnsupportedModel` for what is not ONNX or more than protobuf's 2 GB,
    `InvalidRequest` where there is no file to read."""
    try:
        size = path.stat().st_size
        if size > MAX_MODEL_BYTES:
            raise UnsupportedModel(
                f"{path.name} has {size / 1e9:.1f} GB and protobuf reads 2 GB: save it with external data "
                "(onnx.save(..., save_as_external_data=True))"
            )
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnsupportedModel:
        raise
    except Exception as error:  # protobuf's DecodeError class differs from build to build
        raise UnsupportedModel(f"{path.name} is not an ONNX model: {error}") from error
    if not model.graph.node and not model.graph.output:
        raise UnsupportedModel(f"{path.name} is not an ONNX model: it holds no graph")
    return model


def nodes_of(model: ModelProto) -> Iterator[NodeProto]:
    """Every node: of the graph, its subgraphs and the model's functions."""
    yield from _nodes(model.graph.node)
    for function in model.functions:
        yield from _nodes(function.node)


def _nodes(nodes: Any) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from _nodes(graph.node)


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    sparse = list(model.graph.sparse_initializer)
    yield from model.graph.initializer
    for node in nodes_of(model):
        for graph in _subgraphs(node):
            yield from graph.initializer
            sparse.extend(graph.sparse_initializer)
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            sparse.extend((attribute.sparse_tensor, *attribute.sparse_tensors))
    for one in sparse:
        yield from (one.values, one.indices)


def external_files(model: ModelProto, folder: Path) -> list[str]:
    """The files beside the model that hold its weights, each checked before anything of it is read.

    Raises `UnsafePackage` for a path that is absolute, leads outside `folder` or passes through a link.
    """
    names: set[str] = set()
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            names.update(e.value for e in tensor.external_data if e.key == "location")
    for name in sorted(names):
        absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
        if absolute or name in RESERVED or not all(FILE.fullmatch(part) for part in name.split("/")):
            raise UnsafePackage(f"the model's external data lies at {name[:120]!r}: it must be a plain path beside the model")
        check_no_links(folder, folder / name, f"external data {name}")
    return sorted(names)


def drop_zipmap(model: ModelProto) -> list[ZipMap]:
    """Makes every ZipMap at the graph's outputs an Identity, so that they give tensors; changes `model`."""
    dropped = []
    outputs = {value.name: value for value in model.graph.output}
    for node in [n for n in model.graph.node if n.op_type == "ZipMap" and n.output[0] in outputs]:
        name = node.output[0]
        labels = tuple(_label(item) for a in node.attribute for item in (*a.ints, *a.strings))
        node.CopyFrom(onnx.helper.make_node("Identity", [node.input[0]], [name]))
        outputs[name].CopyFrom(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, len(labels)]))
        dropped.append(ZipMap(name, labels))
    if dropped and not any(opset.domain in ("", "ai.onnx") for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    return dropped


def _label(item: int | bytes) -> str:
    return item.decode() if isinstance(item, bytes) else str(item)


def random_nodes(model: ModelProto) -> list[str]:
    """The operators that draw random numbers."""
    return sorted(
        {n.op_type for n in nodes_of(model) if n.op_type in RANDOM_OPS or (n.op_type == "Dropout" and _trains(model, n))}
    )


def mixing_nodes(model: ModelProto, batch_dims: set[str], outputs: set[str]) -> list[str]:
    """Why rows of these outputs may depend on one another, one reason a node: quantisation by batch, training statistics,
    reductions and softmax over an axis that shape inference says is the batch axis, which `batch_dims` has the names of."""
    shapes = _inferred_shapes(model)
    constants = {t.name: t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL}
    reasons = set(random_nodes(model))
    for node in [*_nodes(_feeding(model.graph, outputs)), *(n for f in model.functions for n in _nodes(f.node))]:
        if node.op_type == "DynamicQuantizeLinear":
            reasons.add("DynamicQuantizeLinear scales by the whole batch")
        elif node.op_type == "BatchNormalization" and _int(node, "training_mode", 0):
            reasons.add("BatchNormalization is in training mode")
        elif node.op_type in REDUCTIONS or node.op_type in ALONG_AXIS:
            shape = shapes.get(node.input[0])
            axes = _axes(node, constants)
            if shape and axes is not None and any(shape[a] in batch_dims for a in axes if -len(shape) <= a < len(shape)):
                reasons.add(f"{node.op_type} '{node.name or node.output[0]}' runs over the batch axis")
    return sorted(reasons)


def _feeding(graph: GraphProto, outputs: set[str]) -> list[NodeProto]:
    """The graph's own nodes that the outputs are computed from; ONNX has each node after those that feed it."""
    wanted, feeding = set(outputs), []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            feeding.append(node)
            wanted.update(name for inner in _nodes([node]) for name in inner.input)
            wanted.update(value.name for inner in _nodes([node]) for g in _subgraphs(inner) for value in g.output)
    return feeding


def _inferred_shapes(model: ModelProto) -> dict[str, list[str | int]]:
    try:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=False)
    except Exception:  # noqa: BLE001 - inference is a help, not a check: its failures are many and none is the model's
        return {}
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def _axes(node: NodeProto, constants: dict[str, TensorProto]) -> list[int] | None:
    """The axes a node runs over: attribute, constant input or default; None where only a run would tell."""
    if node.op_type in ALONG_AXIS:
        axis = _int(node, "axis", ALONG_AXIS[node.op_type])
        if axis is not None:
            return [axis]
    else:
        for attribute in node.attribute:
            if attribute.name == "axes":
                return list(attribute.ints)
    if len(node.input) > 1 and node.input[1]:
        given = constants.get(node.input[1])
        return None if given is None else [int(i) for i in numpy_helper.to_array(given).ravel()]
    return [] if _int(node, "noop_with_empty_axes", 0) else [0]  # a reduction without axes runs over all of them


def _int(node: NodeProto, name: str, default: int | None) -> int | None:
    return next((a.i for a in node.attribute if a.name == name), default)


def _trains(model: ModelProto, dropout: NodeProto) -> bool:
    """Whether a Dropout is fed a constant true `training_mode` (its third input, opset 12 on)."""
    if len(dropout.input) < 3:
        return False
    given = next((t for t in model.graph.initializer if t.name == dropout.input[2]), None)
    return given is not None and bool(numpy_helper.to_array(given).any())


_PRECISIONS: Final = {
    TensorProto.FLOAT: "fp32", TensorProto.DOUBLE: "fp64", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8", TensorProto.UINT8: "int8",
}  # fmt: skip


def precision(model: ModelProto) -> str:
    """The precision of the weights: of most of their elements, "fp32" where there are none (trees keep theirs in attributes)."""
    counts: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_type in _PRECISIONS:
            elements = 1
            for d in tensor.dims:
                elements *= d
            counts[_PRECISIONS[tensor.data_type]] = counts.get(_PRECISIONS[tensor.data_type], 0) + elements
    return max(counts, key=lambda k: counts[k], default="fp32")
