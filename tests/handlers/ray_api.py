"""A small server with the paths of Ray's job API, for what no healthy cluster does and for what needs none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.handlers.loopback import Quiet, served


class JobApi:
    """`jobs`: what was submitted, by submission id."""

    def __init__(self) -> None:
        self.address = ""
        self.jobs: dict[str, dict[str, Any]] = {}


@contextmanager
def job_api(status: str = "RUNNING") -> Iterator[JobApi]:
    """The API of a cluster whose jobs all have that status."""
    api = JobApi()

    class Answer(Quiet):
        def reply(self) -> None:
            name = self.path.rpartition("/")[2]
            if self.command == "GET":
                self.say(200, {"submission_id": name, "status": status}) if name in api.jobs else self.say(404, {})
                return
            job = json.loads(self.body())
            if job["submission_id"] in api.jobs:
                self.say(400, {})
                return
            api.jobs[job["submission_id"]] = job
            self.say(200, {"submission_id": job["submission_id"]})

        def say(self, code: int, content: Any) -> None:
            self.answer(code, json.dumps(content).encode())

    with served(Answer) as api.address:
        yield api
