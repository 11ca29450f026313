"""Packaging models that work: what is published, and that it predicts what the bare ONNX file does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper

from triform import testing
from triform.errors import ConfigurationError, InvalidInput, InvalidReference, UnsupportedModel, VersionExists
from triform.features import Features
from triform.packaging import package_model
from triform.predictor import Predictor
from triform.repository import open_repository
from triform.testing import save, value

Pack = Callable[..., Any]
X = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 1], [-1, 2, 0.5], [0, 0, 0]], dtype=np.float32)
IRIS = Path(onnxruntime.__file__).parent / "datasets/logreg_iris.onnx"


def test_a_plain_model_is_published_verified_and_says_what_it_is(pack: Pack, tmp_path: Path) -> None:
    packed = pack(testing.linear(tmp_path / "l.onnx"), evaluation={"auc": 0.75})
    manifest = packed.manifest
    assert packed.published.ref == "m/1"
    assert [str(t) for t in (*manifest.signature.inputs, *manifest.signature.outputs)] == ["x FP32[rows, 3]", "y FP32[rows, 1]"]
    assert (manifest.row_independence.kind, manifest.precision) == ("exact", "fp32")
    assert manifest.evaluation == {"auc": 0.75}
    assert set(manifest.files) == {"model.onnx", "golden.npz"}
    assert "real ones tell more" in packed.notes
    packed.package.verify("full")
    np.testing.assert_array_equal(packed.predict(x=X)["y"][:, 0], [1, 2, 6, 4.5, 0])
    assert sorted(p.name for p in (tmp_path / "models/m").iterdir()) == ["1"]  # no staging folder is left


def test_versions_count_up_and_a_taken_one_is_refused(pack: Pack, tmp_path: Path, tree: Callable[[Path], dict[str, str]]) -> None:
    model = testing.linear(tmp_path / "l.onnx")
    assert [pack(model, version=v).published.ref for v in (7, None)] == ["m/7", "m/8"]
    before = tree(tmp_path / "models")
    with pytest.raises(VersionExists, match="version 7"):
        pack(testing.centred(tmp_path / "other.onnx"), version=7)
    assert tree(tmp_path / "models") == before


def test_a_stray_folder_in_a_versions_place_does_not_stop_the_next_version(pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "models/m/1").mkdir(parents=True)
    (tmp_path / "models/m/1/notes.txt").write_text("somebody's copy, interrupted")
    (tmp_path / "models/m/2").write_text("a file")
    assert pack(testing.linear(tmp_path / "l.onnx")).published.ref == "m/3"
    with pytest.raises(VersionExists):
        pack(testing.linear(tmp_path / "l.onnx"), version=1)


@pytest.mark.parametrize("version", [0, -1, 10**9])
def test_a_version_that_no_reference_could_name_is_refused(pack: Pack, tmp_path: Path, version: int) -> None:
    with pytest.raises(ConfigurationError, match="version"):
        pack(testing.linear(tmp_path / "l.onnx"), version=version)


@pytest.mark.parametrize("name", ["../etc", "a/b", "", "a\0b", ".hidden", "n" * 101, "ü"])
def test_a_name_that_is_no_plain_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidReference):
        package_model(testing.linear(tmp_path / "l.onnx"), name=name, repository=open_repository(tmp_path / "models"))
    assert not (tmp_path / "models").exists()


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, tree: Callable[[Path], dict[str, str]]) -> None:
    model, toml, samples = testing.text_and_number(tmp_path / "t.onnx"), tmp_path / "m.toml", tmp_path / "s.json"
    toml.write_text('description = "twice"\n[outputs.twice]\ncolumns = ["double"]')
    samples.write_text(json.dumps([{"word": "a", "x": 1.5}, {"word": "é", "x": 2}]))
    made = [
        package_model(model, name="m", repository=open_repository(tmp_path / where), config=toml, samples=samples)
        for where in ("one", "two")
    ]
    assert made[0].digest == made[1].digest
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert {"m/1/model.toml", "m/1/baseline.json"} <= tree(tmp_path / "one").keys()


def test_zipmap_is_dropped_and_its_labels_name_the_columns(pack: Pack) -> None:
    packed = pack(IRIS)
    assert "dropped ZipMap: output 'probabilities'" in packed.notes
    rows = np.random.default_rng(1).normal(3, 2, (6, 2)).astype(np.float32)
    got = Features(packed.manifest.signature, packed.manifest.config).to_columns(packed.predict(float_input=rows))
    assert list(got) == ["label", "probabilities_0", "probabilities_1", "probabilities_2"]
    raw = onnxruntime.InferenceSession(str(IRIS))
    want = [raw.run(None, {"float_input": rows[at : at + 3]}) for at in (0, 3)]  # the graph is fixed to three rows
    np.testing.assert_array_equal(got["label"], np.concatenate([labels for labels, _ in want]))
    for label in (0, 1, 2):
        np.testing.assert_array_equal(got[f"probabilities_{label}"], [p[label] for _, maps in want for p in maps])


def test_a_zipmap_whose_tensor_is_an_output_too_leaves_both(pack: Pack, tmp_path: Path) -> None:
    zipmap = helper.make_node("ZipMap", ["p"], ["z"], domain="ai.onnx.ml", classlabels_strings=["no", "yes"])
    maps = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    out = helper.make_value_info("z", helper.make_sequence_type_proto(maps))
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["p"]), zipmap],
        "g",
        [value("x", "FP32", ["N", 2])],
        [value("p", "FP32", ["N", 2]), out],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "z.onnx")
    packed = pack(tmp_path / "z.onnx")
    got = packed.predict(x=X[:, :2])
    np.testing.assert_array_equal(got["p"], X[:, :2])
    np.testing.assert_array_equal(got["z"], X[:, :2])
    assert packed.manifest.config.outputs["z"].columns == ("z_no", "z_yes")


def test_a_graph_fixed_to_some_rows_is_padded_to_them(pack: Pack, tmp_path: Path) -> None:
    packed = pack(testing.linear(tmp_path / "l.onnx", rows=4))
    assert "the graph is fixed to 4 row(s)" in packed.notes
    for rows in (1, 3, 4, 5):
        np.testing.assert_array_equal(packed.predict(x=X[:rows])["y"][:, 0], [1, 2, 6, 4.5, 0][:rows])


def test_a_size_that_is_free_on_paper_only_is_found(pack: Pack, tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = save(tmp_path / "h.onnx", [node], [value("x", "FP32", ["N", "height"])], [value("y", "FP32", ["N", 2])],
                 {"w": np.ones((48, 2), np.float32)})  # fmt: skip
    assert pack(model).predict(x=np.ones((2, 48), np.float32))["y"].tolist() == [[48, 48], [48, 48]]


def test_a_declared_rank_that_lies_gives_way_to_what_came(pack: Pack, tmp_path: Path) -> None:
    nodes = [  # the target shape goes through a float, where shape inference loses it
        helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["f"], ["i"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["x", "i"], ["y"]),
    ]
    model = save(tmp_path / "lie.onnx", nodes, [value("x", "FP32", ["N", 6])], [value("y", "FP32", ["N", 2])],
                 {"s": np.array([-1, 2, 3])})  # fmt: skip
    packed = pack(model)
    assert packed.manifest.signature.outputs[0].shape == ("rows", 2, 3)
    assert packed.predict(x=np.arange(12, dtype=np.float32).reshape(2, 6))["y"].shape == (2, 2, 3)


def test_made_up_ids_stay_inside_a_vocabulary_that_nobody_told_us_about(pack: Pack, tmp_path: Path) -> None:
    packed = pack(testing.lookup(tmp_path / "l.onnx", entries=90))  # the first made-up ids are inside, some others are not
    assert packed.predict(x=np.array([0, 9, 3]))["y"].tolist() == [0, 90, 30]


SAMPLES: dict[str, Callable[[Path], object]] = {
    "s.json": lambda p: p.write_text(json.dumps({"instances": [{"a": 1, "b": 2, "c": 3}] * 5})),
    "s.csv": lambda p: p.write_text("a,b,c\n" + "1,2,3\n" * 5),
    "s.parquet": lambda p: pq.write_table(pa.table({"c": [3.0] * 5, "a": [1.0] * 5, "b": [2.0] * 5}), p),
    "s.npz": lambda p: np.savez(p, x=np.array([[1, 2, 3]] * 5, np.float32)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_every_kind_become_the_golden_rows(pack: Pack, tmp_path: Path, name: str) -> None:
    SAMPLES[name](tmp_path / name)
    packed = pack(testing.linear(tmp_path / "l.onnx"), '[inputs.x]\ncolumns = ["a", "b", "c"]', samples=tmp_path / name)
    golden = packed.package.golden()
    np.testing.assert_array_equal(golden.inputs["x"], [[1, 2, 3]] * 5)
    np.testing.assert_array_equal(golden.outputs["y"], [[14]] * 5)
    assert "real ones tell more" not in packed.notes
    assert (packed.package.folder / "baseline.json").is_file() is (name != "s.npz")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[]", "no rows"),
        ('[{"a": 1}]', "'b' is missing"),
        ('[{"a": 1, "b": "x", "c": 1}]', "column 'b'"),
        ("[{", "cannot be read"),
    ],
)
def test_samples_that_do_not_fit_are_refused_by_name(pack: Pack, tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(InvalidInput, match=rf"s\.json: .*{complaint}"):
        pack(testing.linear(tmp_path / "l.onnx"), '[inputs.x]\ncolumns = ["a", "b", "c"]', samples=tmp_path / "s.json")


@pytest.mark.parametrize("bad", [0, 20])
def test_a_sample_row_that_the_model_does_not_take_is_refused(pack: Pack, tmp_path: Path, bad: int) -> None:
    ids = np.zeros(40, np.int64)
    ids[bad] = 99
    np.savez(tmp_path / "s.npz", x=ids)
    with pytest.raises(UnsupportedModel, match="does not take the rows of"):
        pack(testing.lookup(tmp_path / "l.onnx"), samples=tmp_path / "s.npz")


def test_golden_rows_are_spread_over_many_samples(pack: Pack, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=np.arange(3000, dtype=np.float32).reshape(1000, 3))
    golden = pack(testing.linear(tmp_path / "l.onnx"), samples=tmp_path / "s.npz").package.golden()
    assert 4 <= len(golden.inputs["x"]) <= 32
    assert golden.inputs["x"][[0, -1], 0].tolist() == [0, 2997]


def test_text_goes_in_and_out_of_a_package(pack: Pack, tmp_path: Path) -> None:
    packed = pack(testing.identity(tmp_path / "t.onnx", "BYTES"))
    assert packed.predict(x=["naïve", "", "日本"])["y"].tolist() == ["naïve", "", "日本"]
    Predictor.load(packed.package, verification="full")
