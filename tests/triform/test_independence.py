"""Whether a row's answer depends on its company: found by the graph's scan where it can tell, by runs where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from triform import independence, testing
from triform.errors import ResourceExhausted, RunFailed, UnsupportedModel
from triform.golden import Tolerance
from triform.package import Deviation
from triform.signature import Array
from triform.testing import save, value

Pack = Callable[..., Any]


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def on_x(path: Path, nodes: list[Any], **constants: Any) -> Path:
    return save(path, nodes, [value("x", "FP32", ["N", 4])], [value("y", "FP32", ["N", 4])], constants)


def quantised(path: Path) -> Path:
    return on_x(path, [node("DynamicQuantizeLinear", "x", "q s z"), node("DequantizeLinear", "q s z", "y")])


def softmax_over_rows(path: Path) -> Path:
    return on_x(path, [node("Softmax", "x", "y", axis=0)])


def softmax_over_features(path: Path) -> Path:
    return on_x(path, [node("Softmax", "x", "y", axis=-1)])


def sum_over_an_opaque_axis(path: Path) -> Path:
    """The axis is computed, so that only a run can tell."""
    nodes = [node("Sub", "one one", "axis"), node("ReduceSum", "x axis", "s", keepdims=1), node("Sub", "x s", "y")]
    return on_x(path, nodes, one=np.array([1]))


def mean_in_a_loop(path: Path) -> Path:
    """Centred in a Loop's body, where shapes are not inferred by name."""
    h, h2 = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("h", "h2"))
    body = helper.make_graph(
        [node("ReduceMean", "h", "m", axes=[0], keepdims=1), node("Sub", "h m", "h2"), node("Identity", "go", "on")],
        "body",
        [value("i", "INT64", []), value("go", "BOOL", []), h],
        [value("on", "BOOL", []), h2],
    )
    return on_x(path, [node("Loop", "n go x", "y", body=body)], n=np.array(1), go=np.array(True))


def reversed_rows(path: Path) -> Path:
    """Each answer belongs to another row: right only for a row that is alone."""
    nodes = [node("Slice", "x last first axis back", "y")]
    return on_x(path, nodes, last=np.array([-1]), first=np.array([-(2**31)]), axis=np.array([0]), back=np.array([-1]))


CASES = [
    (lambda p: testing.linear(p, features=4, outputs=4), "exact", ""),
    (softmax_over_features, "exact", ""),
    (testing.centred, "dependent", "ReduceMean 'm' runs over the batch axis"),
    (quantised, "dependent", "DynamicQuantizeLinear scales by the whole batch"),
    (softmax_over_rows, "dependent", "Softmax 'y' runs over the batch axis"),
    (sum_over_an_opaque_axis, "dependent", "answers moved by up to"),
    (mean_in_a_loop, "dependent", "answers moved by up to"),
    (reversed_rows, "dependent", "answers moved by up to"),
]


@pytest.mark.parametrize(("build", "kind", "reason"), CASES)
def test_the_kind_is_recorded_and_the_reason_told(pack: Pack, tmp_path: Path, build: Any, kind: str, reason: str) -> None:
    packed = pack(build(tmp_path / "m.onnx"))
    seen = packed.manifest.row_independence
    assert seen.kind == kind
    assert seen.by_threads[0].threads == 1
    assert reason in packed.notes
    assert bool(seen.reasons) is ("runs over" in reason or "scales" in reason)
    if kind == "exact":
        assert {d.kind for d in seen.by_threads} == {"exact"}
        assert seen.tolerance == Tolerance(0, 0)


def test_a_dependent_package_still_verifies_and_answers_a_row_alone(pack: Pack, tmp_path: Path) -> None:
    packed = pack(testing.centred(tmp_path / "c.onnx"))
    packed.package.verify("full")
    assert packed.predict(x=np.array([[5, 7]], np.float32))["y"].tolist() == [[0, 0]]


ROWS = {"x": np.arange(10, dtype=np.float32).reshape(5, 2) - 3, "n": np.arange(5)}


def running(change: Callable[[Array, int], Array]) -> independence.Run:
    return lambda inputs: {"y": change(inputs["x"], len(inputs["x"]))}


def fails_on_extremes(x: Array, _: int) -> Array:
    if not np.isfinite(x).all() or np.abs(x).max() > 100:
        raise RunFailed("out of range")
    return x


def fails_in_company(x: Array, rows: int) -> Array:
    if rows > 3:
        raise RunFailed("too many")
    return x


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda x, _: 2 * x, "exact"),
        (lambda x, rows: x + np.float32(1e-6) * (rows > 2), "close"),  # rounding by batch size
        (lambda x, rows: x + np.float32(0.1) * (rows > 100), "dependent"),  # in a large batch only
        (lambda x, _: x - np.nan_to_num(x).max() * (np.abs(x) > 1e3).any(), "dependent"),  # beside an extreme row only
        (lambda x, _: x + np.isnan(x).any(), "dependent"),  # beside a NaN only
        (lambda x, rows: np.where(np.arange(rows)[:, None] == 1, x + 1, x), "dependent"),  # at one position only
        (lambda x, rows: np.nan_to_num(x + 0.001 * (rows > 1) + 0.9995).astype(np.int64), "dependent"),  # a class that flips
        (fails_on_extremes, "exact"),
    ],
)
def test_company_of_every_kind_is_tried(change: Callable[[Array, int], Array], kind: str) -> None:
    run = running(change)
    assert independence.deviation(run, ROWS, independence.alone(run, ROWS), 1).kind == kind


def test_a_model_that_fails_in_its_own_rows_company_is_an_error() -> None:
    run = running(fails_in_company)
    with pytest.raises(RunFailed):
        independence.deviation(run, ROWS, independence.alone(run, ROWS), 1)


def hungry(path: Path) -> Path:
    """y = 2 * x, FP32[rows, 1], but each x of 100 or more asks for 2**48 bytes, more than any process can address."""
    nodes = [
        node("Less", "x limit", "modest"),
        node("Not", "modest", "immodest"),
        node("NonZero", "immodest", "at"),
        node("Shape", "at", "count", start=1),
        node("Mul", "count everything", "size"),
        node("ConstantOfShape", "size", "eaten"),
        node("ReduceSum", "eaten", "nothing", keepdims=0),
        node("Add", "x x", "twice"),
        node("Add", "twice nothing", "y"),
    ]
    tensors = [value("x", "FP32", ["N", 1])], [value("y", "FP32", ["N", 1])]
    return save(path, nodes, *tensors, {"limit": np.array(100, np.float32), "everything": np.array([2**46])})


def test_an_extreme_row_that_memory_does_not_suffice_for_tells_nothing(pack: Pack, tmp_path: Path) -> None:
    """The extreme rows are a thousand times the samples."""
    packed = pack(hungry(tmp_path / "m.onnx"))
    assert packed.manifest.row_independence.kind == "exact"
    assert packed.predict(x=np.array([[1], [99]], np.float32))["y"].tolist() == [[2], [198]]
    with pytest.raises(ResourceExhausted):
        packed.predict(x=np.array([[1], [100]], np.float32))


def test_samples_that_memory_does_not_suffice_for_are_an_error(pack: Pack, tmp_path: Path) -> None:
    rows = tmp_path / "rows.npz"
    np.savez(rows, x=np.array([[1], [2], [100]], np.float32))
    with pytest.raises(ResourceExhausted):
        pack(hungry(tmp_path / "m.onnx"), samples=rows)


@pytest.mark.parametrize(
    ("want", "have", "kind", "ulp"),
    [
        ([1.0, np.nan], [1.0, np.nan], "exact", 0),
        ([1.0], [np.nextafter(np.float32(1), np.float32(2))], "close", 1),
        ([0.0], [-0.0], "close", 1),
        ([-1e-45], [1e-45], "close", 2),
        ([1.0], [1.1], "dependent", None),
        ([1.0], [np.nan], "dependent", None),
        ([np.inf], [np.inf], "exact", 0),
        ([np.inf], [-np.inf], "dependent", None),
        ([1.0], [1.0, 1.0], "dependent", None),
    ],
)
def test_differences_are_measured_in_bits(want: list[float], have: list[float], kind: str, ulp: int | None) -> None:
    seen = independence.difference({"y": np.array(want, np.float32)}, {"y": np.array(have, np.float32)})
    assert seen.kind == kind
    assert ulp is None or seen.max_ulp == ulp


def test_extreme_rows_keep_dtypes_and_stay_inside_what_integers_showed() -> None:
    samples = {**ROWS, "t": np.array(["a"] * 5, dtype=object), "b": np.array([True] * 5), "h": np.full(5, 60000, np.float16)}
    extreme = independence.extreme_rows(samples)
    assert {n: a.dtype for n, a in extreme.items()} == {n: a.dtype for n, a in samples.items()}
    assert extreme["x"][:, 0].tolist()[:3] == [0, 6001, -6001]
    assert np.isnan(extreme["x"][3]).all()
    assert np.isfinite(extreme["h"][:3]).all()
    assert set(extreme["n"].tolist()) == {0, 4}


def test_the_recorded_tolerance_reaches_beyond_what_was_seen() -> None:
    seen = [Deviation(1, "close", 1e-6, 2e-6, 9), Deviation(2, "close", 3e-6, 1e-6, 9)]
    assert independence.tolerance(seen) == Tolerance(1.2e-5, 8e-6)


def test_a_large_batch_of_large_rows_stays_within_memory() -> None:
    """200 photographs at once would take gigabytes where one takes five megabytes."""
    sizes = []

    def run(x: Array, rows: int) -> Array:
        sizes.append(x.nbytes)
        return x[:, 0, 0, 0]

    photographs = {"x": np.zeros((2, 3, 640, 640), np.float32)}
    assert independence.deviation(running(run), photographs, {"y": np.zeros(2, np.float32)}, 1).kind == "exact"
    assert 32 << 20 < max(sizes) <= 64 << 20


def test_the_instruction_set_is_read_from_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags : fpu avx2 fma sse\n")
    assert independence.instruction_set(tmp_path / "cpuinfo").endswith(" avx2 fma")
    assert independence.instruction_set(tmp_path / "none")


def one_row_of_thousands(path: Path) -> Path:
    """y = x, and 1 more if the largest x of the batch is beyond 1e9: the graph says that rows mix, no sample shows it."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], axes=[0], keepdims=1),
        helper.make_node("Greater", ["most", "limit"], ["beyond"]),
        helper.make_node("Cast", ["beyond"], ["excess"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "excess"], ["y"]),
    ]
    tensors = [testing.value("x", "FP32", ["N", 1])], [testing.value("y", "FP32", ["N", 1])]
    return testing.save(path, nodes, *tensors, {"limit": np.array([1e9], np.float32)})


def test_what_the_graph_says_holds_where_no_sample_showed_it(pack: Pack, tmp_path: Path) -> None:
    packed = pack(one_row_of_thousands(tmp_path / "m.onnx"))
    assert {d.kind for d in packed.manifest.row_independence.by_threads} == {"exact"}
    assert packed.load().independence == "dependent"
    assert packed.predict(x=np.array([[1], [2], [4e9]], np.float32))["y"][:2].tolist() == [[1], [2]]


def test_a_dependent_model_answers_each_row_as_if_it_were_alone(pack: Pack, tmp_path: Path) -> None:
    packed = pack(testing.centred(tmp_path / "c.onnx"))
    assert packed.predict(x=np.arange(20, dtype=np.float32).reshape(10, 2))["y"].tolist() == [[0, 0]] * 10


def test_answers_whose_width_depends_on_the_row_are_refused(pack: Pack, tmp_path: Path) -> None:
    """NonZero gives as many columns as the row has values that are not zero."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["at"]),
        helper.make_node("Unsqueeze", ["at", "zero"], ["y"]),
    ]
    model = testing.save(
        tmp_path / "m.onnx",
        nodes,
        [testing.value("x", "FP32", [1, 4])],
        [testing.value("y", "INT64", [1, 2, None])],
        {"zero": np.array([0])},
    )
    rows = tmp_path / "rows.npz"
    np.savez(rows, x=np.array([[1, 0, 0, 0], [1, 1, 0, 0]], np.float32))
    with pytest.raises(UnsupportedModel, match="its rows differ in shape"):
        pack(model, samples=rows)
