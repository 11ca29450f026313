"""Partitions are folders: found however their writer named them, one job each, whatever their values are."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.partitions import decode, encode, jobs
from batch.spec import JobSpec
from triform.errors import ConfigurationError, InputUnreadable
from triform.sources import Sources


def spec(*roots: Path | str, **changes: object) -> JobSpec:
    made = JobSpec(repository="models", model="m", input=tuple(map(str, roots)), output="out")
    return msgspec.structs.replace(made, **changes)


def chosen(*roots: Path | str, **changes: object) -> list[str]:
    return [partition for partition, _ in jobs(spec(*roots, **changes), Sources())]


@given(st.text())
def test_a_value_is_one_folder_and_comes_back(value: str) -> None:
    text = encode(value)
    assert text
    assert not set(text) & set("/=%\\\0\n") - {"%"}
    assert f"x={text}" not in (".", "..")
    assert decode(text) == value


def test_a_folder_that_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputUnreadable, match=r"cannot be read: File name too long"):
        chosen(tmp_path, partition=(f"month={'9' * 300}",))


@pytest.mark.parametrize("name", [b"month=\xff\xfe", b"month=%FF"])
def test_a_name_that_is_not_utf_8_is_named(tmp_path: Path, name: bytes) -> None:
    (tmp_path / os.fsdecode(name)).mkdir()
    with pytest.raises(InputUnreadable, match="not UTF-8: rename its folder") as raised:
        chosen(tmp_path, partition=("month",))
    str(raised.value).encode()


@pytest.mark.parametrize(
    ("value", "folder"),
    [
        ("2013-12", "month=2013-12"),
        ("a/b", "month=a%2Fb"),
        ("..", "month=.."),
        ("../../x", "month=..%2F..%2Fx"),
        ("a=b", "month=a%3Db"),
        ("", "month=__HIVE_DEFAULT_PARTITION__"),
        ("50%", "month=50%25"),
        ("a b:c", "month=a b:c"),  # as Arrow and Hive write it, not as we would
        ("a b:c", "month=a%20b%3Ac"),
        ("[x]*", "month=%5Bx%5D%2A"),
        ("ümläut", "month=%C3%BCml%C3%A4ut"),
        ("ümläut", "month=ümläut"),
    ],
)
def test_a_partition_is_found_however_it_was_encoded(tmp_path: Path, value: str, folder: str) -> None:
    (tmp_path / "in" / folder).mkdir(parents=True)
    (tmp_path / "in" / "month=other").mkdir()
    ((partition, job),) = jobs(spec(tmp_path / "in", partition=(f"month={value}",)), Sources())
    assert job.input == (glob.escape(str(tmp_path / "in" / folder)),)
    assert job.output == f"out/{partition}" == f"out/month={encode(value)}"
    assert (job.partition, job.first, job.last) == ((), None, None)


def test_without_a_partition_the_job_is_what_was_asked(tmp_path: Path) -> None:
    assert jobs(spec(tmp_path), Sources()) == [("", spec(tmp_path))]


@pytest.mark.parametrize(
    ("first", "last", "found"),
    [
        ("2013-02", "2013-10", ["2013-02", "2013-10"]),
        (None, "2013-02", ["2013-01", "2013-02"]),
        ("2013-03", None, ["2013-10", "2013-11"]),
        (None, None, ["2013-01", "2013-02", "2013-10", "2013-11"]),
    ],
)
def test_a_range_takes_what_is_there(tmp_path: Path, first: str | None, last: str | None, found: list[str]) -> None:
    for value in "2013-01", "2013-02", "2013-10", "2013-11":
        (tmp_path / f"month={value}").mkdir()
    (tmp_path / "monthly=2013-05").mkdir()
    (tmp_path / "month=2013-06").write_text("not a folder")
    assert chosen(tmp_path, partition=("month",), first=first, last=last) == [f"month={value}" for value in found]


def test_the_empty_value_is_in_no_range(tmp_path: Path) -> None:
    for value in "9", "10", "11", "__HIVE_DEFAULT_PARTITION__":
        (tmp_path / f"day={value}").mkdir()
    assert chosen(tmp_path, partition=("day",), first="9", last="11") == ["day=9", "day=10", "day=11"]
    assert chosen(tmp_path, partition=("day",), first="10") == ["day=10", "day=11"]
    assert chosen(tmp_path, partition=("day=",)) == ["day=__HIVE_DEFAULT_PARTITION__"]


def test_numbers_are_in_the_order_of_their_size(tmp_path: Path) -> None:
    for value in range(1, 13):
        (tmp_path / f"year=2013/month={value}").mkdir(parents=True)
    found = chosen(tmp_path, partition=("year=2013", "month"), first="9", last="11")
    assert found == ["year=2013/month=9", "year=2013/month=10", "year=2013/month=11"]


def test_partitions_of_several_inputs(tmp_path: Path) -> None:
    for folder in "a/d=1", "a/d=2", "b/d=2", "b/d=3":
        (tmp_path / folder).mkdir(parents=True)
    made = dict(jobs(spec(tmp_path / "a", tmp_path / "b", partition=("d",)), Sources()))
    assert {partition: len(job.input) for partition, job in made.items()} == {"d=1": 1, "d=2": 2, "d=3": 1}


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"partition": ("month=2014-01",)}, InputUnreadable, r"no partition month=2014-01 .*has month=2013-01 to 2013-12"),
        ({"partition": ("day=1",)}, InputUnreadable, r"no partition day=1 .*no folders day=\.\.\."),
        ({"partition": ("month",), "first": "2014"}, InputUnreadable, r"no partition month=\.\.\. from 2014 to the last"),
        ({"partition": ("month",), "first": "2014", "last": "2013"}, ConfigurationError, "--from 2014 comes after --to 2013"),
        ({"partition": ("month=2013-01",), "last": "2013"}, ConfigurationError, "--partition month without a value"),
        ({"first": "2013"}, ConfigurationError, "need --partition NAME"),
        ({"partition": ("month", "day=1")}, ConfigurationError, "only the last"),
        ({"partition": ("=1",)}, ConfigurationError, "not NAME=VALUE"),
        ({"partition": ("a/b=1",)}, ConfigurationError, "not NAME=VALUE"),
        ({"partition": ("..=1",)}, ConfigurationError, "not NAME=VALUE"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, changes: dict[str, object], error: type[Exception], names: str) -> None:
    for value in "2013-01", "2013-12":
        (tmp_path / f"month={value}").mkdir()
    with pytest.raises(error, match=names):
        chosen(tmp_path, **changes)


def test_partitions_on_s3(s3_bucket: str) -> None:
    import boto3

    for key in "in/month=2013-01/a.parquet", "in/month=2013-02/a.parquet", "in/month=2013-02/b/c.parquet", "in/month=a%2Fb/x":
        boto3.client("s3").put_object(Bucket=s3_bucket, Key=key, Body=b"")
    root = f"s3://{s3_bucket}/in"
    assert chosen(root, partition=("month",), first="2013") == ["month=2013-01", "month=2013-02", "month=a%2Fb"]
    ((_, job),) = jobs(spec(root, partition=("month=a/b",)), Sources())
    assert job.input == (f"{root}/month=a%2Fb",)
    with pytest.raises(InputUnreadable, match=r"no partition month=2013-1 .*2013-01 to a/b"):
        chosen(root, partition=("month=2013-1",))
