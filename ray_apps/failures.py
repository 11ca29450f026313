"""Why an application did not start, in a line: Serve keeps the replicas' tracebacks in its status and itself says less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from triform.errors import TriformError


@contextmanager
def told(app: str) -> Iterator[None]:
    """Makes a `TriformError` of whatever Ray or Serve raise where they are started, and the application on them."""
    try:
        yield
    except TriformError:
        raise
    except Exception as error:
        raise TriformError(f"Ray Serve did not start: {of_application(app) or _last_line(str(error))}") from error


def of_application(app: str) -> str:
    """The last line of what its deployments' replicas raised; empty where they said nothing."""
    import ray
    from ray import serve

    if not ray.is_initialized() or app not in (applications := serve.status().applications):
        return ""
    return _last_line("\n".join(deployment.message for deployment in applications[app].deployments.values()))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
