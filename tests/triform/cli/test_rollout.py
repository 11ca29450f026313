"""`triform rollout ...`: what it does to the log, what it tells, and its exit codes."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.triform.rollout.test_evidence import POLICY
from tests.triform.rollout.traffic import of_a_run, windows
from triform.releases import ReleaseLog
from triform.repository import open_repository
from triform.rollout.evidence import Evidence, encode
from triform.rollout.gate import judge
from triform.rollout.policy import read_policy
from triform.rollout_log import RolloutLog

Triform = Callable[..., Any]


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    seen = windows(POLICY, 0, number=5, errors=0.2)
    recorded = Evidence(
        model="linear", stable=1, canary=2, policy=POLICY, windows=tuple(seen), verdict=judge(POLICY, seen, 0, 0.0)
    )
    path = tmp_path / "evidence.json"
    path.write_bytes(encode(recorded))
    return path


def test_a_verdict_is_recomputed(triform: Triform, evidence: Path) -> None:
    said = triform("rollout", "replay", evidence)
    assert (said.code, said.err) == (0, "")
    assert "ROLLBACK: linear/2 beside 1, step 1 of 1" in said.out
    assert "errors: beyond its limit (canary 0.2" in said.out
    assert "the recorded verdict, recomputed" in said.out
    told = triform("rollout", "replay", evidence, "--json").json
    assert (told["same"], told["differences"], told["verdict"]["decision"]) == (True, [], "ROLLBACK")


def test_another_verdict_than_the_recorded_one_fails(triform: Triform, evidence: Path) -> None:
    recorded = msgspec.json.decode(evidence.read_bytes())
    recorded["verdict"]["decision"] = "PROMOTE"
    evidence.write_bytes(msgspec.json.encode(recorded))
    said = triform("rollout", "replay", evidence)
    assert (said.code, "differs: decision: recorded PROMOTE, recomputed ROLLBACK" in said.out) == (1, True)
    assert triform("rollout", "replay", evidence, "--json").json["same"] is False


def test_what_is_no_evidence_is_wrong_use(triform: Triform, tmp_path: Path) -> None:
    assert triform("rollout", "replay", tmp_path / "none.json").code == 2
    (tmp_path / "bad.json").write_text("{}")
    said = triform("rollout", "replay", tmp_path / "bad.json", "--json")
    assert (said.code, said.json["code"]) == (2, "invalid_input")


@pytest.fixture
def linear(three_versions: Path, monkeypatch: pytest.MonkeyPatch) -> RolloutLog:
    """The rollouts of `linear`, in the repository that TRIFORM_REPOSITORY names: stable is 1."""
    monkeypatch.setenv("TRIFORM_REPOSITORY", str(three_versions))
    repository = open_repository(three_versions)
    ReleaseLog(repository, "linear").set(stable=1)
    return RolloutLog(repository, "linear")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "rollout.toml"
    path.write_text("[[steps]]\nweight = 0.1\nmin_requests = 50\nmin_seconds = 60\n[guards.errors]\nincrease = 0.05\n")
    return path


def seen(log: RolloutLog, **canary: Any) -> None:
    """Traffic as replicas would report it."""
    rollout = log.latest()
    assert rollout is not None
    for window in windows(rollout.policy, 0, number=4, **canary):
        log.look(rollout, windows=[window])


def test_a_rollout_from_the_command_line(triform: Triform, linear: RolloutLog, policy: Path) -> None:
    said = triform("rollout", "start", "linear", "2", "--policy", policy, "--reason", "retrained", "--by", "ann")
    assert (said.code, said.err) == (0, "")
    assert "rollout 1 of linear: version 2 beside 1, step 1 of 1, 10% of the keys" in said.out
    assert "by ann: retrained" in said.out
    release = triform("release", "show", "linear", "--json").json
    assert (release["canary"]["weight"], release["reason"], release["changed_by"]) == (0.1, "rollout 1", "ann")

    assert triform("rollout", "pause", "linear").code == 0
    seen(linear, errors=0.0)
    told = triform("rollout", "status", "linear", "--json").json
    assert (told["state"]["phase"], told["share"], told["sides"]["canary"]["errors"]) == ("paused", 0.1, 0)
    assert told["sides"]["canary"]["requests"] + told["sides"]["stable"]["requests"] == 4000
    assert told["verdict"]["decision"] == "CONTINUE"

    assert triform("rollout", "promote", "linear", "--reason", "I know it").code == 0
    (one,) = triform("rollout", "history", "linear", "--json").json
    assert (one["state"]["phase"], one["state"]["reason"]) == ("promoted", "promoted by hand: I know it")
    assert "2 beside 1" in triform("rollout", "history", "linear").out
    assert triform("release", "show", "linear", "--json").json["stable"] == 2
    assert triform("rollout", "status", "linear", "--json").json["share"] == 1.0


def test_watching_tells_a_line_an_entry_and_ends_with_the_rollout(triform: Triform, linear: RolloutLog, policy: Path) -> None:
    triform("rollout", "start", "linear", "2", "--policy", policy)
    seen(linear, errors=0.6)
    said = triform("rollout", "watch", "linear")
    assert said.code == 1
    lines = said.out.splitlines()
    assert "step 1 of 1, 10% of the keys: begun" in lines[0]
    assert "rolled back: canary" in lines[-1]
    assert "ROLLBACK: errors: beyond its limit" in lines[-1]
    assert len(lines) == len(linear.read(1).entries)


@pytest.mark.parametrize(("edge", "share"), [(0.5, 0.5), (2.0, 0.1)])
def test_bins_that_see_no_shift_promote_nothing_and_what_to_do_is_told(
    triform: Triform, linear: RolloutLog, policy: Path, tmp_path: Path, edge: float, share: float
) -> None:
    """The scores are probabilities: none is beyond 2."""
    policy.write_text(f"{policy.read_text()}[guards.score_shift]\nedges = [{edge}]\n[[steps]]\nweight = 0.5\n")
    triform("rollout", "start", "linear", "2", "--policy", policy)
    rollout = linear.latest()
    assert rollout is not None
    for window in windows(rollout.policy, 0, number=4, errors=0.0, requests=20_000):
        if rollout.state.step == 0:
            linear.look(rollout, windows=[window])
    assert triform("rollout", "status", "linear", "--json").json["share"] == share
    (tmp_path / "evidence.json").write_text(triform("rollout", "evidence", "linear").out)
    triform("rollout", "abort", "linear")
    for command in ("status", "linear"), ("watch", "linear"), ("replay", tmp_path / "evidence.json"):
        said = " ".join(triform("rollout", *command).out.split())
        assert ("score_shift: no data (nearly all scores of both sides lie in one outer bin" in said) == (edge == 2.0)
        assert ("set guards.score_shift.edges" in said) == (edge == 2.0)


def test_on_a_terminal_it_is_live(triform: Triform, linear: RolloutLog, policy: Path) -> None:
    """One view that changes in place: the first share, then the end."""
    triform("rollout", "start", "linear", "2", "--policy", policy)
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 200))
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    command = [Path(sys.executable).with_name("triform"), "rollout", "watch", "linear", "--every", "0.1"]
    watching = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environ)
    os.close(terminal)
    shown = until_shown(screen, "step 1 of 1, 10% of the keys")
    seen(linear, errors=0.6)
    shown = until_shown(screen, "ROLLBACK: errors: beyond its limit") + until_shown(screen, None)
    os.close(screen)
    assert watching.wait(60) == 1
    assert "\x1b[" in shown, "it moves back to where the view begins"
    assert f"#{linear.read(1).judged[-1]} ROLLBACK" in shown
    assert "Traceback" not in shown


def until_shown(screen: int, text: str | None, seconds: float = 60.0) -> str:
    """What the terminal got up to there; None: to the end."""
    got, deadline = b"", time.monotonic() + seconds
    while text is None or text.encode() not in got:
        assert time.monotonic() < deadline, got.decode(errors="replace")
        if select.select([screen], [], [], 1.0)[0]:
            try:
                got += os.read(screen, 1 << 16)
            except OSError:  # nobody writes any more
                assert text is None, got.decode(errors="replace")
                break
    return got.decode(errors="replace")


def test_last_nights_run_stands_for_the_shadow(triform: Triform, linear: RolloutLog, tmp_path: Path) -> None:
    (tmp_path / "rollout.toml").write_text("[shadow]\nmin_seconds = 3600\n[guards.disagreement]\nlimit = 0.05\n")
    evidence = of_a_run(linear.repository, read_policy(tmp_path / "rollout.toml"))
    (tmp_path / "evidence.json").write_bytes(encode(evidence))
    files = "--policy", tmp_path / "rollout.toml", "--shadowed", tmp_path / "evidence.json"
    said = triform("rollout", "start", "linear", "2", *files)
    assert (said.code, said.err) == (0, "")
    assert "step 1 of 3, 1% of the keys" in said.out
    rows = sum(window.shadowed.rows for window in evidence.windows)
    assert f"running: shadowed by a batch run: {rows:,} rows" in said.out
    told = triform("rollout", "status", "linear", "--json").json
    assert (told["share"], told["sides"]["canary"]["requests"], told["verdict"]) == (0.01, 0, None)
    (line,) = triform("rollout", "watch", "linear", "--timeout", "0").out.splitlines()
    assert f"#0 step 1 of 3, 1% of the keys: shadowed by a batch run: {rows:,} rows" in line
    assert "2 beside 1" in triform("rollout", "history", "linear").out
    assert triform("rollout", "abort", "linear").code == 0


def test_watching_may_end_before_the_rollout(triform: Triform, linear: RolloutLog, policy: Path) -> None:
    triform("rollout", "start", "linear", "2", "--policy", policy)
    assert triform("rollout", "watch", "linear", "--timeout", "0").code == 1
    assert linear.read(1).state.phase == "running"


def test_aborting_needs_nothing_that_runs(triform: Triform, linear: RolloutLog, policy: Path) -> None:
    triform("rollout", "start", "linear", "2", "--policy", policy)
    assert "rolled back: aborted: users complain" in triform("rollout", "abort", "linear", "--reason", "users complain").out
    assert triform("release", "show", "linear", "--json").json["canary"] is None
    said = triform("rollout", "resume", "linear", "--json")
    assert (said.code, said.json["code"]) == (2, "invalid_request")
    assert "is over: rolled_back" in said.json["error"]


def test_two_rollouts_at_once_are_refused(triform: Triform, linear: RolloutLog, policy: Path) -> None:
    assert triform("rollout", "start", "linear", "2", "--policy", policy).code == 0
    said = triform("rollout", "start", "linear", "3", "--json")
    assert (said.code, said.json["code"]) == (1, "release_conflict")
    assert "one at a time; see `triform rollout status linear`" in said.json["error"]
    assert linear.latest().number == 1  # type: ignore[union-attr]


def test_evidence_is_what_replay_reads(triform: Triform, linear: RolloutLog, policy: Path, tmp_path: Path) -> None:
    triform("rollout", "start", "linear", "2", "--policy", policy)
    assert triform("rollout", "evidence", "linear").code == 2
    seen(linear, errors=0.6)
    (tmp_path / "evidence.json").write_text(triform("rollout", "evidence", "linear").out)
    said = triform("rollout", "replay", tmp_path / "evidence.json")
    assert (said.code, "ROLLBACK: linear/2 beside 1, step 1 of 1" in said.out) == (0, True)


def test_each_verdict_has_its_own_evidence(triform: Triform, linear: RolloutLog, policy: Path, tmp_path: Path) -> None:
    triform("rollout", "start", "linear", "2", "--policy", policy)
    triform("rollout", "pause", "linear")
    seen(linear, errors=0.0)
    judged = linear.read(1).judged
    assert len(judged) == 5, "four windows and the pause"
    for number in judged:
        (tmp_path / "evidence.json").write_text(triform("rollout", "evidence", "linear", "--entry", str(number)).out)
        told = triform("rollout", "replay", tmp_path / "evidence.json", "--json").json
        assert (told["same"], told["verdict"]["decision"]) == (True, "CONTINUE")
        assert f"#{number} step 1 of 1" in triform("rollout", "watch", "linear", "--timeout", "0").out
    said = triform("rollout", "evidence", "linear", "--entry", "0")
    assert (said.code, "entry 0 of rollout 1 of 'linear' has no verdict" in " ".join(said.err.split())) == (2, True)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("start", "nobody", "2"), "no model 'nobody'"),
        (("start", "linear", "9"), "'linear' has no version 9"),
        (("start", "linear", "1"), "version 1 is stable already"),
        (("start", "linear", "2", "--policy", "/none/rollout.toml"), "/none/rollout.toml"),
        (("start", "linear", "2", "--shadowed", "/none/evidence.json"), "/none/evidence.json: cannot be read"),
        (("status", "linear"), "'linear' has had no rollout: begin one with"),
        (("status", "linear", "--rollout", "7"), "'linear' has no rollout 7"),
        (("pause", "linear"), "'linear' has had no rollout"),
    ],
)
def test_wrong_use_is_told(triform: Triform, linear: RolloutLog, command: tuple[str, ...], says: str) -> None:
    said = triform("rollout", *command)
    assert said.code in (1, 2)
    assert says in " ".join(said.err.split())
    assert linear.latest() is None


def test_what_is_done_is_on_record(
    triform: Triform, linear: RolloutLog, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIFORM_AUDIT", str(tmp_path / "audit.log"))
    triform("rollout", "start", "linear", "2", "--policy", policy, "--by", "ann")
    triform("rollout", "resume", "linear", "--by", "bob")
    triform("rollout", "abort", "linear", "--by", "bob")
    lines = [msgspec.json.decode(line) for line in (tmp_path / "audit.log").read_bytes().splitlines()]
    assert [(line["who"], line["what"], line["result"]) for line in lines] == [
        ("ann", "rollout.start", "ok"), ("bob", "rollout.resume", "invalid_request"), ("bob", "rollout.abort", "ok"),
    ]  # fmt: skip
