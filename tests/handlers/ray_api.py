"""A small server with the paths of Ray's job API, for what no healthy cluster does and for what needs none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JobApi:
    """`jobs`: what was submitted, by submission id."""

    def __init__(self) -> None:
        self.address = ""
        self.jobs: dict[str, dict[str, Any]] = {}


@contextmanager
def job_api(status: str = "RUNNING") -> Iterator[JobApi]:
    """The API of a cluster whose jobs all have that status."""
    api = JobApi()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            self.answer(200, {"submission_id": name, "status": status}) if name in api.jobs else self.answer(404, {})

        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if job["submission_id"] in api.jobs:
                self.answer(400, {})
                return
            api.jobs[job["submission_id"]] = job
            self.answer(200, {"submission_id": job["submission_id"]})

        def answer(self, code: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    api.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
