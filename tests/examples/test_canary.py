"""`make demo-canary`: its bad version, and (slow) all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples import canary
from triform.errors import TriformError
from triform.features import Features
from triform.predictor import Predictor
from triform.rollout.policy import read_policy


def test_the_bad_version_is_sound_by_day_and_fails_in_the_evening(flights: Path, tmp_path: Path) -> None:
    repository = canary.prepare(flights, tmp_path / "canary")
    good, bad = (repository.package("flight-delay", version) for version in (2, 3))
    bad.verify("full")
    records = canary.records(flights)
    loaded = [Predictor.load(package) for package in (good, bad)]
    features = Features(loaded[0].signature, loaded[0].manifest.config)
    evening = [record["sched_dep_minute"] >= 60 * canary.FORGOTTEN_FROM for record in records]
    assert 0.05 < np.mean(evening) < 0.3
    for wanted in False, True:
        some = [record for record, late in zip(records, evening, strict=True) if late is wanted][:50]
        tensors = features.from_records(some)
        if wanted:
            with pytest.raises(TriformError):
                loaded[1].predict(tensors)
        else:
            assert np.array_equal(loaded[0].predict(tensors)["probabilities"], loaded[1].predict(tensors)["probabilities"])


def test_its_policy_is_one() -> None:
    policy = read_policy(canary.POLICY)
    assert [step.weight for step in policy.steps] == [0.1, 0.5]


@pytest.mark.slow
def test_a_good_version_is_promoted_and_a_bad_one_rolled_back(flights: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.canary", "--flights", str(flights), "--to", str(tmp_path / "canary")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "promoted: " in done.stdout
    assert "rolled back: " in done.stdout
    assert "stable 2" in done.stdout
