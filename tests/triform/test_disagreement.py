"""Columns of two versions, compared row by row and added up: lists, texts, and parts in any order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from triform.disagreement import ColumnCount, ComparedPart, crashed, merge_columns, rows_apart
from triform.golden import Tolerance
from triform.rollout.windows import SHADOW, Window

EXACT = Tolerance(0.0, 0.0)


def disagreeing(first: Any, second: Any, kind: pa.DataType, other: pa.DataType | None = None) -> list[bool]:
    mask, _, _ = rows_apart(pa.array(first, kind), pa.array(second, other or kind), EXACT)
    return mask.tolist()


def test_lists_disagree_in_any_element_and_in_their_length() -> None:
    kind = pa.list_(pa.float32())
    assert disagreeing([[1, 2], [1, 2], [1], []], [[1, 2], [1, 3], [1, 1], []], kind) == [False, True, True, False]


def test_lists_of_lists() -> None:
    kind = pa.list_(pa.list_(pa.int64()))
    assert disagreeing([[[1], [2, 3]], [[1]]], [[[1], [2, 4]], [[1]]], kind) == [True, False]


def test_a_list_is_never_a_single_value() -> None:
    assert disagreeing([[1.0]], [1.0], pa.list_(pa.float32()), pa.float32()) == [True]


def test_texts_and_booleans() -> None:
    assert disagreeing(["a", "ä", ""], ["a", "a", " "], pa.string()) == [False, True, True]
    assert disagreeing([True, False], [True, True], pa.bool_()) == [False, True]
    assert disagreeing(["1"], [1], pa.string(), pa.int64()) == [True]


def count(part: int, first: Any, second: Any) -> ComparedPart:
    column = ColumnCount(part, "y", EXACT, edges=(0.5,))
    arrays = pa.array(first, pa.float32()), pa.array(second, pa.float32())
    column.score(*arrays)
    column.compare(*arrays, 100 * part + np.arange(len(first)))
    return ComparedPart(part=part, windows=(Window(step=SHADOW, seconds=1.0),), columns=(column.seen,))


def test_parts_in_any_order_come_to_the_same() -> None:
    parts = [count(0, [0, 1, 1], [0, 1, np.nan]), count(1, [1, 1], [1, 3]), count(2, [0], [0])]
    (merged,) = merge_columns(parts)
    assert merge_columns(parts[::-1]) == [merged]
    assert (merged.rows, merged.largest, merged.relative) == (2, 2.0, 2.0)
    assert (merged.stable, merged.candidate) == ((2, 4, 0), (2, 3, 1))
    assert merged.example is not None
    assert (merged.example.part, merged.example.row, merged.example.candidate) == (1, 101, "3.0")


def test_a_disagreement_without_a_size_has_an_example_too() -> None:
    (column,) = count(3, [1.0, 2.0], [1.0, np.nan]).columns
    assert column.example is not None
    assert (column.example.row, column.example.stable, column.example.candidate) == (301, "2.0", "nan")
    assert (column.largest, column.relative) == (0.0, 0.0)


def test_a_part_of_one_side_only_takes_part() -> None:
    nothing = ComparedPart(part=1, windows=(Window(step=SHADOW, seconds=1.0),))
    assert merge_columns([nothing, count(0, [1], [1])]) == merge_columns([count(0, [1], [1])])
    assert merge_columns([]) == []


def test_a_crashed_part_is_the_candidates_error() -> None:
    (window,) = crashed(4, 70, "it died").windows
    assert (window.stable.errors, window.canary.errors, window.canary.requests) == (0, 70, 70)
    assert not window.complete


@pytest.mark.parametrize("long", ["x" * 10_000])
def test_examples_are_short(long: str) -> None:
    column = ColumnCount(0, "y", EXACT, edges=(0.5,))
    column.compare(pa.array([long]), pa.array(["y"]), np.arange(1))
    example = column.seen.example
    assert example is not None
    assert len(example.stable) == 120
