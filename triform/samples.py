"""Sample rows for a model that nobody gave any: made from its signature, deterministic, tried until the model takes them.

Dynamic sizes may be free on paper only ("free height" that fails unless 48), so common sizes are tried in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

import numpy as np

from triform.errors import RunFailed, UnsupportedModel
from triform.signature import Array, Dim, TensorMetadata

SIZES: Final = (8, 32, 48, 64, 128, 224, 512, 1, 16, 256, 3)
MAX_INTEGERS: Final = (100, 2)  # ids must stay inside vocabularies that nobody told us about
MAX_BYTES: Final = 64 << 20  # of all rows: larger rows are fewer, but FEWEST
FEWEST: Final = 2

T = TypeVar("T")


def invent(
    tensors: Sequence[TensorMetadata], rows: int, try_out: Callable[[Mapping[str, Array]], T]
) -> tuple[dict[str, Array], T]:
    """Made-up rows that the model takes, `rows` of them or fewer large ones, and what `try_out` returned for them.

    Raises `UnsupportedModel`, with the model's last complaint, where it takes none.
    """
    last: Exception | None = None
    for inputs in _candidates(tensors, rows):
        try:
            return inputs, try_out(inputs)
        except RunFailed as error:
            last = error
    raise UnsupportedModel(
        f"the model takes none of the rows made up from its signature; give real ones with --samples, or the true shape with "
        f"[inputs.NAME] shape = [...] in model.toml. Its last complaint: {last}"
    )


def _candidates(tensors: Sequence[TensorMetadata], rows: int) -> Iterator[dict[str, Array]]:
    dynamic = any(_is_free(d) for t in tensors for d in t.row_shape)
    for size in SIZES if dynamic else SIZES[:1]:
        for largest in MAX_INTEGERS if any(t.dtype.kind in "iu" for t in tensors) else MAX_INTEGERS[:1]:
            shapes = [[size if _is_free(d) else int(d) for d in t.row_shape] for t in tensors]
            fitting = MAX_BYTES // max(sum(int(np.prod(s)) * 8 for s in shapes), 1)
            if fitting >= FEWEST or not dynamic:
                made, random = min(rows, max(fitting, FEWEST)), np.random.default_rng(0)
                yield {t.name: _made(t, (made, *s), largest, random) for t, s in zip(tensors, shapes, strict=True)}


def _is_free(dim: Dim) -> bool:
    return isinstance(dim, str) or dim < 0


def _made(tensor: TensorMetadata, shape: tuple[int, ...], largest: int, random: np.random.Generator) -> Array:
    kind = tensor.dtype.kind
    if kind == "f":
        return random.standard_normal(shape).astype(tensor.dtype)
    if kind == "b":
        return random.integers(0, 2, shape).astype(np.bool_)
    if kind in "iu":
        return random.integers(0, largest, shape).astype(tensor.dtype)
    words = np.array(["", "a", "B", "word", "two words", "é", "0", "naïve text"], dtype=object)
    return np.asarray(words[random.integers(0, len(words), shape)])
