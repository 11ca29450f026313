"""Ray's job API for tests: the token of the session's cluster, and a small server with the same three paths."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest


@pytest.fixture
def token_secret(ray_cluster: Any, s3_bucket: str) -> dict[str, str]:
    """The setting that names the secret with the cluster's token, as the SDK sends it; none where Ray asks for none."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    headers = {name.lower(): value for name, value in get_auth_headers_if_auth_enabled({}).items()}
    if not headers:
        return {}
    token = headers["authorization"].removeprefix("Bearer ")
    boto3.client("secretsmanager").create_secret(Name=f"ray-{s3_bucket}", SecretString=token)
    return {"ray_token_secret": f"ray-{s3_bucket}"}


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
