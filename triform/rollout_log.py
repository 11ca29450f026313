"""The rollouts of one model: what each was told, saw and decided, kept beside its releases for whoever goes on with it.

    <model>/rollouts/000003-000000.json    how rollout 3 began: the policy, the versions
    <model>/rollouts/000003-000017.json    entry 17: windows, the verdict on all windows so far, the state that follows

    start, a look, a person's command -> rollout/machine.py: advance -> the next entry -> the next revision of the release log

An entry is created exclusively, as a revision is: of two who look at once, one writes, and the other looks anew. The entry comes
before the revision, and what it asks for is asked again until the release log has it. So whoever looks next goes on, wherever the
one before was killed; a controller need not be alive for a person's command, and two of them do no harm.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from triform.errors import ConfigurationError, InvalidRequest, ReleaseConflict, StoreError, VersionNotFound
from triform.releases import MAX_REASON, Canary, Release, ReleaseLog, Shadow, whoami
from triform.repository import ModelRepository
from triform.rollout.evidence import Evidence, as_shadow
from triform.rollout.gate import Verdict
from triform.rollout.machine import ENDED, Action, Command, Observation, State, advance, begin
from triform.rollout.policy import Policy
from triform.rollout.windows import Window
from triform.splitting import KeyRule
from triform.stores.files import last_number

ATTEMPTS: Final = 100  # to be first with an entry
HEARTBEAT_SECONDS: Final = 60.0  # that nothing new is kept to one entry, so that watched time is not lost


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A look at a rollout. `policy`: of its first entry alone, whose windows are a batch run's. `revision`: of the release log,
    when it was looked at."""

    state: State
    revision: int
    by: str
    at: str  # ISO 8601, UTC
    nonce: str  # tells the writer whether an entry is its own after a lost response
    policy: Policy | None = None
    windows: tuple[Window, ...] = ()
    verdict: Verdict | None = None
    cut: str | None = None
    command: Command | None = None
    reason: str = ""


class Rollout:
    """One rollout, as far as its entries have been read."""

    def __init__(self, model: str, number: int, first: Entry) -> None:
        if first.policy is None:
            raise StoreError(f"rollout {number} of '{model}' is damaged: its first entry has no policy")
        self.model = model
        self.number = number
        self.policy: Policy = first.policy
        self.entries = [first]
        self.windows = [*first.windows]
        self.release: Release | None = None  # the latest that was looked at

    @property
    def state(self) -> State:
        """What the latest entry says."""
        return self.entries[-1].state

    @property
    def began(self) -> float:
        """When, in Unix time."""
        return datetime.datetime.fromisoformat(self.entries[0].at).timestamp()

    @property
    def ended(self) -> bool:
        return self.state.phase in ENDED

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.windows += entry.windows

    @property
    def judged(self) -> list[int]:
        """The numbers of the entries that have a verdict."""
        return [number for number, entry in enumerate(self.entries) if entry.verdict is not None]

    def evidence(self, number: int) -> Evidence:
        """The verdict of that entry, one of `judged`, and all that it rests on."""
        entry = self.entries[number]
        if entry.verdict is None:
            raise ValueError(f"entry {number} has no verdict")
        return Evidence(
            model=self.model,
            stable=self.state.stable,
            canary=self.state.canary,
            at=entry.at,
            policy=self.policy,
            windows=tuple(window for entry in self.entries[: number + 1] for window in entry.windows),
            verdict=entry.verdict,
        )


class RolloutLog:
    """The rollouts of one model in a repository. Holds no state of its own. `clock`: Unix time."""

    def __init__(self, repository: ModelRepository, model: str, clock: Callable[[], float] = time.time) -> None:
        self.repository = repository
        self.model = model
        self.releases = ReleaseLog(repository, model)
        self._clock = clock

    def latest(self, known: Rollout | None = None) -> Rollout | None:
        """The last one that was begun, or None; looked for from `known` on."""
        if known is None:
            number = last_number(lambda n: self._read(n, 0) is not None)
            return self.read(number) if number else None
        number = known.number
        while self._read(number + 1, 0) is not None:
            number += 1
        return self.read(number) if number > known.number else self.follow(known)

    def read(self, number: int) -> Rollout:
        """Raises `VersionNotFound` where there is no such rollout, `StoreError` for a damaged one."""
        first = self._read(number, 0)
        if first is None:
            raise VersionNotFound(f"'{self.model}' has no rollout {number}")
        return self.follow(Rollout(self.model, number, first))

    def follow(self, rollout: Rollout) -> Rollout:
        """The same, with the entries that others have written since."""
        while (entry := self._read(rollout.number, len(rollout.entries))) is not None:
            rollout.add(entry)
        return rollout

    def start(
        self, policy: Policy, canary: int, *, shadowed: Evidence | None = None, reason: str = "", by: str | None = None
    ) -> Rollout:
        """Begins a rollout and writes its first revision, after verifying in full the version and stable, to which a rollback
        leads. `shadowed`: what a batch run has compared, in place of the policy's shadow step (see `as_shadow`).

        Raises `ReleaseConflict` where one is under way, `InvalidRequest` (also for evidence that is of something else, or does
        not suffice), `VersionNotFound`, `PackageError`.
        """
        by, before = by or whoami(), self.latest()
        if before is not None and before.state.phase != "promoted":
            self.look(before, by=by)  # somebody may have released something since, or its end may be still to be written
        if before is not None and not before.ended:
            raise self._under_way(before)
        release = self.releases.current()
        if release is None:
            raise InvalidRequest(f"'{self.model}' was never released: name its first stable version with `triform release set`")
        _check_reason(reason)
        state, windows = begin(policy, release, canary), tuple[Window, ...]()
        if shadowed is not None:
            state, windows = self._past_shadow(state, policy, shadowed)
        state = msgspec.structs.replace(state, at=self._clock())
        for version in (canary, release.stable):
            self.repository.package(self.model, version).verify("full")
        first = self._entry(state, release, by, policy=policy, windows=windows, reason=reason)
        number = before.number + 1 if before is not None else 1
        if not self._create(number, 0, first):
            raise self._under_way(self.read(number))
        rollout = Rollout(self.model, number, first)
        self.look(rollout, by=by)
        return rollout

    def look(
        self,
        rollout: Rollout,
        *,
        windows: Sequence[Window] = (),
        cut: str | None = None,
        command: Command | None = None,
        reason: str = "",
        by: str | None = None,
        nonce: str | None = None,
    ) -> Entry:
        """Takes in what was seen since the last look, and does what follows. The entry that says so, or else the latest.

        `cut`: why a replica gives the canary no more keys; `command`: what a person wants, because of `reason`. `nonce`: by which
        windows are known again whose look ended with a `StoreError`, and which may be on record all the same.

        Raises `InvalidRequest` for a command that the state does not take, `StoreError`; both leave everything to the next look.
        """
        by = by or whoami()
        _check_reason(reason)
        for _ in range(ATTEMPTS):
            before = self.follow(rollout).state
            if nonce is not None and any(entry.nonce == nonce for entry in rollout.entries):
                windows, cut, command, reason, nonce = (), None, None, "", None
            release = rollout.release = self.releases.in_force(rollout.release)
            seen = Observation(windows=[*rollout.windows, *windows], release=release, cut=cut, command=command)
            now = self._clock()
            state, actions, verdict = advance(rollout.policy, before, seen, now)
            if rollout.ended and not self._is_undone(rollout, actions, release):
                actions = ()
            if command is not None and (not actions or command == "promote" or (rollout.ended and command != "abort")):
                self._refuse_idle(rollout, seen, state, now, by)
            if reason:
                state = msgspec.structs.replace(state, reason=f"{state.reason}: {reason}")
                actions = tuple(msgspec.structs.replace(action, reason=state.reason) for action in actions)
            told = bool(windows or cut or command) and not (rollout.ended and not actions)
            beats = not rollout.ended and not (state.at or 0.0) - (before.at or 0.0) < HEARTBEAT_SECONDS
            if told or beats or not _same(state, before):
                entry = self._entry(
                    state, release, by, windows=tuple(windows), verdict=verdict, cut=cut, command=command,
                    reason=state.reason if not _same(state, before) else "", nonce=nonce,
                )  # fmt: skip
                if not self._create(rollout.number, len(rollout.entries), entry):
                    continue
                rollout.add(entry)
            if self._act(rollout, actions, by) and not (_raises(actions) and self.follow(rollout).ended):
                return rollout.entries[-1]
            windows, cut, command, reason, nonce = (), None, None, "", None  # they are on record
        raise ReleaseConflict(f"'{self.model}': {ATTEMPTS} other writers were first, one after another; try again")

    def _past_shadow(self, state: State, policy: Policy, shadowed: Evidence) -> tuple[State, tuple[Window, ...]]:
        """At the first step with traffic, and the windows before it. Raises `InvalidRequest`."""
        versions = state.stable, state.canary
        if (shadowed.model, shadowed.stable, shadowed.canary) != (self.model, *versions):
            of = f"'{shadowed.model}', {shadowed.canary} beside {shadowed.stable}"
            raise InvalidRequest(f"the evidence is of {of}: this is '{self.model}', {state.canary} beside {state.stable}")
        if shadowed.digests is None:
            raise InvalidRequest("the evidence names no packages, as that of `python -m batch run --compare` does")
        if shadowed.digests != tuple(self.repository.package(self.model, version).manifest.digest for version in versions):
            raise InvalidRequest("the evidence is of other packages than this repository has under these numbers")
        windows = as_shadow(shadowed, policy)
        reason = f"shadowed by a batch run: {sum(w.shadowed.rows for w in windows):,} rows, {shadowed.at[:40]}"
        return msgspec.structs.replace(state, first=0, step=0, reason=reason), windows

    def _is_undone(self, rollout: Rollout, actions: Sequence[Action], release: Release) -> bool:
        """Whether what the end of the rollout asks for is still to be done, and its own to do: a version that was off since then
        is somebody else's, and so is what is stable under a later revision.

        What a slower writer of the rollout has put there after its end is to be taken off, too.
        """
        last = rollout.entries[-1].revision
        if not any(action.kind == "rollback" for action in actions) or release.revision == last:
            return release.revision == last
        stayed = all(rollout.state.canary in _beside(self.releases.read(revision)) for revision in range(last, release.revision))
        its_own = release.reason.partition(":")[0] == _named(rollout)
        return stayed or (its_own and release.changed_by in {entry.by for entry in rollout.entries})

    def _refuse_idle(self, rollout: Rollout, seen: Observation, state: State, now: float, by: str) -> None:
        """Raises `InvalidRequest` where a command changes nothing; what the log tells goes on record all the same."""
        before = rollout.state
        if rollout.ended:
            self.look(rollout, by=by)
            raise InvalidRequest(f"rollout {rollout.number} of '{self.model}' is over: {before.phase} ({before.reason})")
        if state == advance(rollout.policy, before, _without(seen), now)[0]:
            self.look(rollout, by=by)
            raise InvalidRequest(f"rollout {rollout.number} of '{self.model}' is {_doing(state)}: it cannot {seen.command} now")

    def _act(self, rollout: Rollout, actions: Sequence[Action], by: str) -> bool:
        """Writes what the release log should say; False if that is a rollback and another writer was first.

        What raises the canary's share is left to the next look then: it sees who was first.
        """
        for action in actions:
            try:
                self._write(rollout, action, by)
            except ReleaseConflict:
                if action.kind == "rollback":
                    return False
        return True

    def _write(self, rollout: Rollout, action: Action, by: str) -> None:
        release, version = rollout.release, rollout.state.canary
        rule = rollout.policy.key if rollout.policy.key != KeyRule() else None
        why = f"{_named(rollout)}{': ' if action.reason else ''}{action.reason}"
        self.releases.set(
            stable=version if action.kind == "promote" else None,
            canary=Canary(version, action.share, rule) if action.kind == "canary" else None,
            shadow=Shadow(version, action.share) if action.kind == "shadow" else None,
            reason=why[:MAX_REASON],
            changed_by=by,
            expect=release.revision if release is not None else 0,
        )

    def _entry(
        self,
        state: State,
        release: Release,
        by: str,
        *,
        policy: Policy | None = None,
        windows: tuple[Window, ...] = (),
        verdict: Verdict | None = None,
        cut: str | None = None,
        command: Command | None = None,
        reason: str = "",
        nonce: str | None = None,
    ) -> Entry:
        at = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC).isoformat(timespec="milliseconds")
        return Entry(
            state=state, revision=release.revision, by=by, at=at, nonce=nonce or new_nonce(), policy=policy, windows=windows,
            verdict=verdict, cut=cut, command=command, reason=reason,
        )  # fmt: skip

    def _create(self, number: int, entry: int, content: Entry) -> bool:
        """False if somebody else's entry is in its place."""
        if self.repository.create_note(self.model, _name(number, entry), msgspec.json.encode(content)):
            return True
        there = self._read(number, entry)
        return there is not None and there.nonce == content.nonce

    def _read(self, number: int, entry: int) -> Entry | None:
        note = self.repository.read_note(self.model, _name(number, entry))
        try:
            return None if note is None else msgspec.json.decode(note.content, type=Entry)
        except (msgspec.DecodeError, ConfigurationError) as error:
            raise StoreError(f"entry {entry} of rollout {number} of '{self.model}' is damaged: {error}") from error

    def _under_way(self, rollout: Rollout) -> ReleaseConflict:
        return ReleaseConflict(
            f"rollout {rollout.number} of '{self.model}' is {_doing(rollout.state)}, of version {rollout.state.canary}: "
            f"one at a time; see `triform rollout status {self.model}`"
        )


def new_nonce() -> str:
    return os.urandom(8).hex()


def _named(rollout: Rollout) -> str:
    """How the reasons of its revisions begin."""
    return f"rollout {rollout.number}"


def _beside(release: Release) -> set[int]:
    return {beside.version for beside in (release.canary, release.shadow) if beside}


def _raises(actions: Sequence[Action]) -> bool:
    """Whether they give the version requests: somebody may have ended the rollout meanwhile."""
    return any(action.kind in ("canary", "shadow") for action in actions)


def _name(number: int, entry: int) -> str:
    return f"rollouts/{number:06d}-{entry:06d}.json"


def _check_reason(reason: str) -> None:
    if len(reason) > MAX_REASON:
        raise InvalidRequest(f"reason: {len(reason)} characters, {MAX_REASON} at most")


def _without(seen: Observation) -> Observation:
    """The same, and nobody wants anything."""
    return msgspec.structs.replace(seen, command=None)


def _same(one: State, other: State) -> bool:
    """But for the time."""
    return msgspec.structs.replace(one, watched=0.0, at=None) == msgspec.structs.replace(other, watched=0.0, at=None)


def _doing(state: State) -> str:
    at = "a shadow" if state.step < 0 else f"at step {state.step + 1}"
    return f"{state.phase.replace('_', ' ')}, {at}"
