"""What became of requests, from several processes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from loadtests.records import MOST, OK, OTHERS, REFUSED, Collected, Recorder, load


def test_records_of_two_processes_come_together_whatever_each_calls_what(tmp_path: Path) -> None:
    one, other = Recorder(["tfs", "oip-json"]), Recorder(["tfs", "oip-json"])
    one.add(3.0, 0.5, 0.25, "oip-json", OK, 1000)
    other.add(1.0, 0.0, 0.5, "tfs", REFUSED, 8, "429: too many")
    other.add(2.0, 0.0, 0.75, "tfs", OK, 1)
    collected = Collected()
    for recorder in one, other, one:  # the last has nothing new
        collected.absorb(msgspec.msgpack.decode(msgspec.msgpack.encode(recorder.take())))
    collected.save(tmp_path / "records.npz")
    records = load(tmp_path / "records.npz")
    assert records["due"].tolist() == [1.0, 2.0, 3.0]
    assert [collected.outcomes[number] for number in records["outcome"]] == [REFUSED, OK, OK]
    assert records["rows"].tolist() == [8, 1, 1000]
    assert records["protocol"].tolist() == [0, 0, 1]
    np.testing.assert_allclose(records["waited"], [0.5, 0.75, 0.25])
    assert collected.examples[REFUSED] == "429: too many"


def test_a_target_that_invents_errors_does_not_fill_the_tables() -> None:
    recorder = Recorder(["tfs"])
    for number in range(1000):
        recorder.add(0.0, 0.0, 0.0, "tfs", f"http_500_{number}", 1)
    taken = recorder.take()
    assert len(taken["outcomes"]) == MOST + 1
    assert taken["outcomes"][-1] == OTHERS


def test_nothing_was_asked(tmp_path: Path) -> None:
    Collected().save(tmp_path / "records.npz")
    assert len(load(tmp_path / "records.npz")["due"]) == 0
