"""The Serve form in a Ray of its own on this machine, for as long as a block lasts.

    environment -> Ray, which batch jobs of this process then use too -> begin: the application, not waited for -> wait

Everything is on loopback, at ports that nobody else has.
"""

from __future__ import annotations

import http.client
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from batch.pool import Cluster
from ray_apps.failures import of_application
from ray_apps.ports import Ports, free_ports
from triform.errors import TriformError

HOST: Final = "127.0.0.1"
APP: Final = "flights"


class LocalServe:
    """Use `local_serve`. `http` and `grpc`: the addresses, host:port, which answer after `wait`."""

    def __init__(self, ports: Ports) -> None:
        self.http = f"{HOST}:{ports.http}"
        self.grpc = f"{HOST}:{ports.grpc}"
        self._ports = ports
        self._begun = 0.0

    def begin(self, repository: Path, **arguments: Any) -> None:
        """Starts the application with the models of the repository; it gets ready while the caller does something else.
        `arguments`: further ones of `build_app`."""
        from ray import serve
        from ray.serve.api import RunTarget

        from ray_apps.predict import GRPC, build_app

        self._begun = time.monotonic()
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(
            http_options={"host": HOST, "port": self._ports.http},
            grpc_options={"port": self._ports.grpc, "grpc_servicer_functions": [GRPC], "enable_reflection": False},
        )
        args = {"repository": str(repository.absolute()), "num_cpus": 0, "drain_s": 0, "allow_anonymous": True, **arguments}
        target = RunTarget(build_app(args), name=APP)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def wait(self, seconds: float = 120.0) -> float:
        """Until it is ready; how many seconds that was since it was begun. Raises `TriformError` where Serve gave up, or needs
        more than these."""
        from ray import serve

        while not self._is_ready():
            found = serve.status().applications[APP]
            if found.status == "DEPLOY_FAILED":
                raise TriformError(f"Serve did not start: {of_application(APP)}")
            if time.monotonic() > self._begun + seconds:
                raise TriformError(f"Serve was not ready after {seconds:.0f} s ({found.status})")
            time.sleep(0.1)
        return time.monotonic() - self._begun

    def _is_ready(self) -> bool:
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(self.http, timeout=10)
            try:
                connection.request("GET", "/v2/health/ready")
                return connection.getresponse().status == 200
            finally:
                connection.close()
        return False


@contextmanager
def local_serve() -> Iterator[LocalServe]:
    """Starts Ray, whose processes all end with the block."""
    folder = Path(tempfile.mkdtemp(prefix="serve-"))  # short: the kernel limits the paths of sockets
    ports = Ports(*free_ports(4))
    os.environ.update(ports.environment(folder))
    try:
        with Cluster("local"):
            yield LocalServe(ports)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
