"""What answers requests: of API Gateway (REST, HTTP), a Load Balancer, a Function URL, or direct invocations.

    event -> _events.py -> HttpRequest -> triform/http.py -> HttpResponse -> _events.py -> answer
                           body by reference: _references.py         body by reference: _references.py

The run is ended some time before the platform would kill the environment, and the caller is told (504). An answer that Lambda
would not pass on is an error that says so (413), never cut.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from handlers._boot import Booted
from handlers._events import INPUT, OUTPUT, Source, check_fits, source_of
from handlers._identity import identity_of
from handlers._references import References
from handlers._telemetry import Context
from triform.errors import DeadlineExceeded, InvalidRequest, TriformError
from triform.headers import REQUEST_ID
from triform.http import HttpRequest, HttpResponse, at_once
from triform.protocols.bodies import write_json
from triform.telemetry import InferenceRecord

log = logging.getLogger("triform.handlers")


class Function:
    """One environment's function: what was booted, and the references that it may follow."""

    def __init__(self, booted: Booted) -> None:
        self.booted = booted
        self.references = References(booted.settings.reference_prefixes, booted.settings.reference_bytes)

    def __call__(self, event: Any, context: Context) -> dict[str, Any]:
        """Answers an event; never raises, so that no caller is shown a traceback."""
        with self.booted.telemetry.invocation(context):
            started = time.perf_counter()
            source = source_of(event, self.booted.service.models.the_default)
            request: HttpRequest | None = None
            try:
                request = self._identified(event, source.request())
                response = self._respond(request, context)
            except TriformError as error:
                response = self._refuse(error, request, context)
                self._record(error, response, started)
            except Exception:
                log.exception("request %s failed", context.aws_request_id)
                fault = TriformError("the function failed; its log knows why")
                response = self._refuse(fault, request, context)
                self._record(fault, response, started)
            return self._fitting(source, request, response, context)

    def _identified(self, event: Any, request: HttpRequest) -> HttpRequest:
        """With the caller whom AWS vouches for, if it does for one; else his key or signature decides."""
        identity, access = identity_of(event), self.booted.surface.access
        return request if identity is None or access is None else request._replace(caller=access.of_platform(identity))

    def _respond(self, request: HttpRequest, context: Context) -> HttpResponse:
        left = context.get_remaining_time_in_millis() / 1000 - self.booted.settings.deadline_margin
        if left <= 0:
            raise DeadlineExceeded("the function has too little time left to answer")
        deadline = time.monotonic() + left
        source, target = _named(request, INPUT), _named(request, OUTPUT)
        if source is not None or target is not None:
            request = at_once(self.booted.surface.admit(request))  # before anything is read for him
        if target is not None:
            self.references.check(target)  # before the work
            headers = [(name, value) for name, value in request.headers if name.lower() != "accept-encoding"]
            request = request._replace(headers=headers)
        if source is not None:
            if request.body:
                raise InvalidRequest("expected an input by reference or one in the request itself, not both")
            request = request._replace(body=self.references.read(source, deadline))
        response = self.booted.surface.handle(request, deadline=deadline, request_id=context.aws_request_id)
        if response.status >= 400 and not self.booted.telemetry.recorded:  # no inference, so nothing else tells of it
            log.info("request %s was answered %d", response.headers[REQUEST_ID], response.status)
        if target is None or response.status != 200:
            return response
        self.references.write(target, response.body, deadline)
        kind = response.headers["content-type"]
        body = write_json({"output": target, "bytes": len(response.body), "content_type": kind})
        return response._replace(headers={**response.headers, "content-type": "application/json"}, body=body)

    def _fitting(self, source: Source, request: HttpRequest | None, response: HttpResponse, context: Context) -> dict[str, Any]:
        """The answer, or why there is none that fits."""
        answer = source.answer(response)
        try:
            check_fits(answer, source.limit)
        except TriformError as error:
            self.booted.telemetry.amend(error.code)
            return source.answer(self._refuse(error, request, context))
        return answer

    def _refuse(self, error: TriformError, request: HttpRequest | None, context: Context) -> HttpResponse:
        return self.booted.surface.refuse(error, request.headers if request else (), context.aws_request_id)

    def _record(self, error: TriformError, response: HttpResponse, started: float) -> None:
        """Of a request that did not reach the surface, or whose answer could not be written."""
        telemetry = self.booted.telemetry
        if telemetry.recorded:
            telemetry.amend(error.code)
            return
        seconds = time.perf_counter() - started
        request_id = response.headers[REQUEST_ID]
        telemetry.record(InferenceRecord(form="lambda", code=error.code, seconds=seconds, request_id=request_id))


def _named(request: HttpRequest, header: str) -> str | None:
    return next((value.strip() for name, value in request.headers if name.lower() == header), None)
