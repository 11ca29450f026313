"""Which run an output stands for: `<output>/_current/000001.json`, a log whose latest entry counts."""

from __future__ import annotations

import msgspec

from triform.errors import OutputExists
from triform.runs.folder import read_json
from triform.stores.files import FileStore, last_number


class Current(msgspec.Struct, frozen=True):
    """An entry of `_current/`."""

    run: str
    previous: str | None
    committed_at: str


def current(files: FileStore) -> Current | None:
    """The run that the output stands for: the latest of the log `_current/`."""
    latest = _latest(files)
    return read_json(files, _entry(latest), Current) if latest else None


def _latest(files: FileStore) -> int:
    return last_number(lambda number: files.exists(_entry(number)))


def _entry(number: int) -> str:
    return f"_current/{number:06d}.json"


def check_output(files: FileStore, run: str, if_exists: str) -> None:
    """Raises `OutputExists` if the output stands for another run and may not be replaced."""
    now = current(files)
    if now is not None and now.run != run and if_exists == "fail":
        raise OutputExists(
            f"{files.location} already stands for run {now.run}, committed {now.committed_at}, of other inputs or another model. "
            "Use --if-exists replace to let this run take its place (the old one stays readable), or another --output"
        )


def point_at(files: FileStore, run: str, committed_at: str, if_exists: str) -> None:
    """Lets the output stand for a committed run: the next entry of `_current/`, created exclusively, so that of two runs that
    come at once each knows of the other. Raises `OutputExists`."""
    files.make_folder("_current")
    while True:
        check_output(files, run, if_exists)
        latest, now = _latest(files), current(files)
        if now is not None and now.run == run:
            return
        content = Current(run, now.run if now else None, committed_at)
        if files.create(_entry(latest + 1), msgspec.json.encode(content)):
            return
