"""Made-up rows: deterministic, of every datatype, tried until the model takes them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from triform.errors import RunFailed, UnsupportedModel
from triform.samples import invent
from triform.signature import DATATYPES, Array, TensorMetadata


def test_every_datatype_is_made_the_same_way_each_time() -> None:
    tensors = [TensorMetadata(d.oip, d.oip, ("rows", 2)) for d in DATATYPES]
    one, answer = invent(tensors, 16, lambda inputs: sorted(inputs))
    again, _ = invent(tensors, 16, lambda _: None)
    assert answer == sorted(d.oip for d in DATATYPES)
    for tensor in tensors:
        assert (one[tensor.name].dtype, one[tensor.name].shape) == (tensor.dtype, (16, 2))
        assert len(set(one[tensor.name].ravel().tolist())) > 1  # rows that are all alike would prove nothing
        np.testing.assert_array_equal(one[tensor.name], again[tensor.name])


@pytest.mark.parametrize("size", [1, 3, 8, 48, 224])
def test_free_sizes_are_found(size: int) -> None:
    def try_out(inputs: Mapping[str, Array]) -> None:
        if inputs["x"].shape != (16, 3, size, size):
            raise RunFailed("wrong size")

    assert invent([TensorMetadata("x", "FP32", ("rows", 3, "h", -1))], 16, try_out)[0]["x"].shape == (16, 3, size, size)


def test_a_model_that_takes_nothing_is_refused_with_its_last_complaint() -> None:
    def try_out(inputs: Mapping[str, Array]) -> None:
        raise RunFailed(f"I do not like {inputs['x'].shape[1]}")

    with pytest.raises(UnsupportedModel, match=r"--samples.*I do not like"):
        invent([TensorMetadata("x", "FP32", ("rows", -1))], 16, try_out)


def test_rows_stay_small_whatever_the_signature_says() -> None:
    def try_out(inputs: Mapping[str, Array]) -> None:
        assert sum(a.nbytes for a in inputs.values()) <= 64 << 20
        raise RunFailed("another size, please")

    with pytest.raises(UnsupportedModel):
        invent([TensorMetadata("x", "FP64", ("rows", -1, -1, -1, 100))], 16, try_out)


@pytest.mark.parametrize(("shape", "rows"), [((3, 640, 640), 6), ((3, 2048, 2048), 2), ((), 16)])
def test_large_rows_of_a_fixed_size_are_made_all_the_same(shape: tuple[int, ...], rows: int) -> None:
    made, _ = invent([TensorMetadata("x", "UINT8", ("rows", *shape))], 16, lambda _: None)
    assert made["x"].shape == (rows, *shape)
