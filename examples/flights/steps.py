"""Build steps that know whether they are done: a step is trusted only if its stamp and its files agree.

A stamp is written last, and names what the step was made from (its key) and the SHA-256 of every file in the
folders that it owns. A step that was killed, whose files changed, or whose key moved on is made anew.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, flock
from importlib.metadata import version
from pathlib import Path

STAMPS = ".flights-build"


class ForeignFiles(ValueError):
    """A folder holds what no build here made, so that building would delete somebody's work."""


@dataclass(frozen=True)
class Step:
    """`key` changes when what the step is made from does; `owns` are its folders, relative to the build's."""

    name: str
    key: str
    owns: tuple[str, ...]


@contextmanager
def building_in(root: Path) -> Iterator[None]:
    """Hold `root` for one build at a time; a second one waits.

    Raises ForeignFiles if `root` holds something that is not an earlier build: steps delete what they own.
    """
    stamps = root / STAMPS
    if root.exists() and not stamps.is_dir() and any(root.iterdir()):
        raise ForeignFiles(f"{root} is not empty and holds no earlier build; name another folder")
    stamps.mkdir(parents=True, exist_ok=True)
    with (stamps / "lock").open("w") as lock:
        flock(lock, LOCK_EX)
        yield


def run(step: Step, root: Path, make: Callable[[], str]) -> None:
    """Call `make`, which fills the folders that `step` owns and says what it did, unless the step stands."""
    started = time.perf_counter()
    if stands(step, root):
        return report(step.name, "stands", started)
    stamp = _stamp(step, root)
    stamp.unlink(missing_ok=True)
    for folder in step.owns:
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).parent.mkdir(parents=True, exist_ok=True)
    done = make()
    unfinished = stamp.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"key": step.key, "files": _files(step, root)}, indent=1))
    unfinished.replace(stamp)
    return report(step.name, done, started)


def stands(step: Step, root: Path) -> bool:
    """Whether the step was finished, from what it would be made from now, and its files are still those."""
    try:
        recorded = json.loads(_stamp(step, root).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return bool(recorded == {"key": step.key, "files": _files(step, root)})


def report(name: str, what: str, started: float) -> None:
    """Print one line of progress, with the seconds since `started` (of `time.perf_counter`)."""
    print(f"{name:11}{time.perf_counter() - started:6.1f} s  {what}", flush=True)


def key_of(files: Iterable[Path], *, distributions: Iterable[str] = ()) -> str:
    """SHA-256 of the names and contents of `files` and the installed versions of `distributions`."""
    parts = [f"{path.name} {sha256(path)}" for path in files]
    parts += [f"{name} {version(name)}" for name in distributions]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(step: Step, root: Path) -> Path:
    return root / STAMPS / f"{step.name.replace(' ', '-')}.json"


def _files(step: Step, root: Path) -> dict[str, str]:
    paths = (path for folder in step.owns for path in sorted((root / folder).rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): sha256(path) for path in paths}
