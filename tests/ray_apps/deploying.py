"""What a user does on a cluster: Ray started in the right environment, `serve deploy CONFIG`, a question. In its own process.

python -m tests.ray_apps.deploying CONFIG HTTP_PORT GRPC_PORT       prints the answers, over REST and gRPC
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import grpc
import ray

from ray_apps.messages import MESSAGES, SERVICE


def main(config: str, http_port: int, grpc_port: int) -> None:
    ray._private.parameter.RayParams = partial(ray._private.parameter.RayParams, dashboard_agent_listen_port=0)
    context = ray.init("local", num_cpus=2, include_dashboard=True, dashboard_port=0, log_to_driver=False)
    try:
        serve = [Path(sys.executable).with_name("serve"), "deploy", "--address", f"http://{context.dashboard_url}", config]
        done = subprocess.run(serve, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        await_ready(f"http://127.0.0.1:{http_port}/v2/health/ready", time.monotonic() + 120)
        asked = urllib.request.Request(f"http://127.0.0.1:{http_port}/v1/models/linear:predict", b'{"instances": [[1, 2, 3]]}')
        with urllib.request.urlopen(asked, timeout=60) as answer:  # noqa: S310
            print(answer.read().decode())
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            index = channel.unary_unary(
                f"/{SERVICE}/RepositoryIndex",
                request_serializer=MESSAGES["RepositoryIndexRequest"].SerializeToString,
                response_deserializer=MESSAGES["RepositoryIndexResponse"].FromString,
            )
            print(*(f"{m.name}/{m.version} {m.state}" for m in index(MESSAGES["RepositoryIndexRequest"](), timeout=60).models))
    finally:
        ray.shutdown()


def await_ready(url: str, deadline: float) -> None:
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):  # noqa: S310
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                from ray import serve

                sys.exit(f"not ready: {serve.status()}")
            time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
