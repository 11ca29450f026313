"""The plan is pure: every row in exactly one part, limits kept, identities changed by what matters and nothing else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triform.runs.inputs import InputFile, RowGroup
from triform.runs.plan import PART_BYTES, PART_ROWS, Pinned, PinnedCanary, Plan, job_id, make_plan
from triform.scoring import Layout

GROUPS = st.builds(
    RowGroup,
    rows=st.sampled_from([0, 1, 100, PART_ROWS // 2, PART_ROWS, PART_ROWS + 1]),
    size=st.sampled_from([0, 10, PART_BYTES // 3, PART_BYTES, PART_BYTES + 1]),
)
FILES = st.lists(st.lists(GROUPS, max_size=12), min_size=1, max_size=5).map(
    lambda files: [InputFile(f"/in/{i}.parquet", 1000 + i, f"digest {i}", tuple(groups)) for i, groups in enumerate(files)]
)
PINNED = Pinned("m/1", "d" * 64)


def plan(files: list[InputFile], layout: Layout | None = None, **changes: Any) -> Plan:
    options = {"model": "m@stable", "pinned": PINNED, "repository": "/models"} | changes
    return make_plan(files, layout or Layout(scored_at="2026-01-01T00:00:00+00:00"), **options)


@given(FILES)
def test_every_row_is_in_exactly_one_part_in_order(files: list[InputFile]) -> None:
    made = plan(files)
    assert [part.number for part in made.parts] == list(range(len(made.parts)))
    rows = [(part.path, row) for part in made.parts for row in (part.first_row, part.first_row + part.rows)]
    assert rows == sorted(rows)
    for file in files:
        mine = [part for part in made.parts if part.path == file.path]
        groups = [n for part in mine for n in part.row_groups]
        assert groups == sorted(set(groups))
        assert {n for n, group in enumerate(file.row_groups) if group.rows} <= set(groups)
        assert sum(part.rows for part in mine) == file.rows
        for part in mine:
            assert part.rows == sum(file.row_groups[n].rows for n in part.row_groups)
            assert part.rows > 0 or made.rows == 0
            assert not part.row_groups or part.first_row == sum(group.rows for group in file.row_groups[: part.row_groups[0]])
            assert part.row_groups == tuple(range(min(part.row_groups, default=0), max(part.row_groups, default=-1) + 1))
            assert (part.size, part.fingerprint) == (file.size, file.fingerprint)
    assert made.rows == sum(file.rows for file in files)


def test_files_without_any_row_still_give_one_part_that_writes_the_schema() -> None:
    empty = InputFile("/in/a.parquet", 1000, "digest", ())
    made = plan([empty, msgspec.structs.replace(empty, path="/in/b.parquet", row_groups=(RowGroup(0, 4),))])
    assert [(part.path, part.rows) for part in made.parts] == [("/in/a.parquet", 0)]


@given(FILES)
def test_parts_keep_the_limits_and_are_not_cut_needlessly(files: list[InputFile]) -> None:
    made = plan(files)
    groups = {(file.path, n): group for file in files for n, group in enumerate(file.row_groups)}

    def fits(path: str, numbers: tuple[int, ...]) -> bool:
        together = [groups[path, n] for n in numbers]
        return sum(g.rows for g in together) <= PART_ROWS and sum(g.size for g in together) <= PART_BYTES

    for part in made.parts:
        assert len(part.row_groups) <= 1 or fits(part.path, part.row_groups)
    for part, following in zip(made.parts, made.parts[1:], strict=False):
        if part.path == following.path and part.row_groups[-1] + 1 == following.row_groups[0]:
            assert not fits(part.path, (*part.row_groups, following.row_groups[0]))


@given(FILES)
def test_a_plan_survives_being_frozen(files: list[InputFile]) -> None:
    made = plan(files)
    assert msgspec.json.decode(msgspec.json.encode(made), type=Plan) == made


FILE = InputFile("/in/a.parquet", 1000, "digest", (RowGroup(10, 100),))
OTHER = InputFile("/in/b.parquet", 1000, "digest", (RowGroup(10, 100),))


@pytest.mark.parametrize(
    ("changes", "run", "job"),
    [
        ({}, False, False),
        ({"repository": "/elsewhere"}, False, True),
        ({"layout": Layout(scored_at="2027-01-01T00:00:00+00:00")}, False, False),
        ({"pinned": Pinned("m/9", PINNED.digest)}, False, False),
        ({"pinned": Pinned("m/1", "e" * 64)}, True, False),
        ({"model": "m/1"}, False, True),
        ({"layout": Layout(key=("id",))}, True, True),
        ({"layout": Layout(keep=("id",))}, True, True),
        ({"files": [FILE, OTHER]}, True, True),
        ({"files": [msgspec.structs.replace(FILE, path="/in/c.parquet")]}, True, True),
        ({"files": [msgspec.structs.replace(FILE, size=1001)]}, True, True),
        ({"files": [msgspec.structs.replace(FILE, fingerprint="other")]}, True, True),
    ],
    ids=str,
)
def test_identities_change_with_what_matters_and_nothing_else(changes: dict[str, Any], run: bool, job: bool) -> None:
    """Actors, addresses and limits cannot matter: the planner is not told of them."""
    before, after = plan([FILE]), plan(**{"files": [FILE]} | changes)
    assert (after.run != before.run, after.job != before.job) == (run, job)


def test_identities_are_those_of_every_version_of_the_code() -> None:
    """An unfinished run is found again after an update, and a committed one is not scored anew."""
    made = plan([FILE])
    assert (made.run, made.job) == ("591fe1b4e17fa85a", "85993c9a74a3eb61")


def test_a_run_that_is_shared_is_another_by_all_that_decides_who_answers() -> None:
    canary = Pinned("m/2", "c" * 64)
    split = PinnedCanary(canary=canary, points=1000, salt="salt", column="user", revision=7)
    others = [{"canary": Pinned("m/2", "d" * 64)}, {"points": 1001}, {"salt": "other"}, {"column": "other"}]
    plans = [plan([FILE]), *(plan([FILE], split=msgspec.structs.replace(split, **change)) for change in [{}, *others])]
    assert len({made.run for made in plans}) == 6
    assert plan([FILE], split=msgspec.structs.replace(split, revision=8)).run == plans[1].run, "of a rollout that goes on"
    assert (plans[1].versions, plans[0].versions) == ((PINNED, canary), (PINNED,))
    assert job_id([FILE], Layout(), "m", "/models", split=True) != job_id([FILE], Layout(), "m", "/models")


def test_key_and_kept_columns_are_not_mistaken_for_one_another() -> None:
    columns = [(("a", "b"), ()), (("a",), ("b",)), ((), ("a", "b")), (("a,b",), ()), (("b", "a"), ())]
    layouts = [Layout(key, keep) for key, keep in columns]
    assert len({plan([FILE], layout).run for layout in layouts}) == len(layouts)


def test_identities_are_the_same_for_ever() -> None:
    """An unfinished run of an earlier release is found again; a change here is a new PLAN_VERSION."""
    made = plan([FILE], Layout(key=("id",), keep=("kept",)))
    assert (made.run, made.job) == ("d4e5791d83a7c085", "55c58074a9d54de5")
