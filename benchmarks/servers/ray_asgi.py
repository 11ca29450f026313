"""`raw_asgi.py` on Ray Serve, behind the same HAProxy and with the same settings as Triform: what Serve itself costs.

python -m benchmarks.servers.ray_asgi PORT
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.servers.ray_fastapi import serve_until_told


def main() -> None:
    from ray import serve

    from benchmarks.servers.raw_asgi import RawApp

    class Raw:
        def __serve_build_asgi_app__(self) -> Any:
            return RawApp()

    options = {"max_ongoing_requests": 1024, "logging_config": {"enable_access_log": False, "log_level": "WARNING"}}
    serve_until_told(serve.deployment(serve.ingress()(Raw), **options).bind(), int(sys.argv[1]))


if __name__ == "__main__":
    main()
