"""The least that can answer: ASGI without a framework, orjson, `session.run` on the event loop. Nothing is checked.

    uvicorn benchmarks.servers.raw_asgi:app

The same bodies as the Open Inference Protocol has, JSON and binary, but only as the benchmark sends them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from benchmarks.servers.model import open_session

HEADER_LENGTH = b"inference-header-content-length"


class RawApp:
    """Opens the model when the server starts it."""

    def __init__(self) -> None:
        self.session = open_session()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message.get("more_body"):
                break
        length = dict(scope["headers"]).get(HEADER_LENGTH)
        head = orjson.loads(body if length is None else body[: int(length)])
        tensor = head["inputs"][0]
        if length is None:
            x = np.array(tensor["data"], dtype=np.float32).reshape(tensor["shape"])
        else:
            x = np.frombuffer(body, np.float32, offset=int(length)).reshape(tensor["shape"])
        (y,) = self.session.run(["y"], {"x": x})
        output = {"name": "y", "datatype": "FP32", "shape": y.shape}
        if length is None:
            answer = orjson.dumps({"outputs": [{**output, "data": y.ravel()}]}, option=orjson.OPT_SERIALIZE_NUMPY)
            headers = [(b"content-type", b"application/json")]
        else:
            head = orjson.dumps({"outputs": [{**output, "parameters": {"binary_data_size": y.nbytes}}]})
            answer = head + y.tobytes()
            headers = [(b"content-type", b"application/octet-stream"), (HEADER_LENGTH, str(len(head)).encode())]
        headers.append((b"content-length", str(len(answer)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


async def _lifespan(receive: Any, send: Any) -> None:
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


def app() -> RawApp:
    """For `uvicorn --factory`."""
    return RawApp()
