"""Execution environments: real `python -m awslambdaric` processes, each with a Runtime API of its own; started on demand.

    invoke(payload) -> an idle environment, else a new one, else throttled -> Outcome + Report
                       over its time: killed; the next request gets a clean environment

What Lambda does that matters to a handler is done here: one invocation at a time in an environment, initialisation before the
first, provisioned environments ahead of it, deadlines that end in a kill, and environments that go when nobody asks for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

from infra.local.runtime_api import Outcome, RuntimeApi, Work

ROOT: Final = Path(__file__).parent.parent.parent
Initialization = Literal["on-demand", "provisioned-concurrency", "snap-start"]
TIMED_OUT: Final = "Sandbox.Timedout"
EXITED: Final = "Runtime.ExitError"
THROTTLED: Final = "TooManyRequestsException"
Lines = Callable[[str], None]


class FunctionConfig(NamedTuple):
    """How the function is set up. Times in seconds; `environ` is all that its processes see."""

    handler: str = "handlers.predict.handler"
    environ: Mapping[str, str] = os.environ
    name: str = "triform-local"
    memory_mb: int = 1769
    timeout: float = 30.0
    init_timeout: float = 60.0  # Lambda's 10 s on demand, on machines that may be busy
    idle: float = 300.0  # after which an environment goes
    provisioned: int = 0
    max_concurrency: int = 10


class Report(NamedTuple):
    """One invocation, as Lambda's REPORT line tells of it. `init_ms`: of the request that waited for a new environment."""

    request_id: str
    duration_ms: float
    init_ms: float | None
    peak_bytes: int
    error: str | None

    def __str__(self) -> str:
        init = "" if self.init_ms is None else f"  Init Duration: {self.init_ms:.1f} ms"
        error = "" if self.error is None else f"  Error: {self.error}"
        peak = self.peak_bytes >> 20
        return f"REPORT RequestId: {self.request_id}  Duration: {self.duration_ms:.2f} ms  Max Memory: {peak} MB{init}{error}"


class Environment:
    """One process and its endpoint. `start` first; then one `invoke` at a time."""

    def __init__(self, config: FunctionConfig, initialization: Initialization, line: Lines) -> None:
        self.initialization = initialization
        self.init_ms: float | None = None
        self.used = time.monotonic()
        self._config = config
        self._line = line
        self._api = RuntimeApi()
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "awslambdaric", config.handler],
            cwd=ROOT,
            env=self._environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read, self._watch)]
        for thread in self._threads:
            thread.start()

    def _environ(self) -> dict[str, str]:
        config = self._config
        kept = {k: v for k, v in config.environ.items() if not k.startswith(("AWS_LAMBDA_", "_X_AMZN"))}
        path = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
        return {
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            **kept,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "AWS_LAMBDA_RUNTIME_API": self._api.address,
            "AWS_LAMBDA_FUNCTION_NAME": config.name,
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(config.memory_mb),
            "AWS_LAMBDA_INITIALIZATION_TYPE": self.initialization,
        }

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> Outcome | None:
        """Waits until it is initialised; what went wrong, if it is not."""
        if not self._api.started.wait(self._config.init_timeout):
            self._api.fail_init(_failure(TIMED_OUT, f"Init timed out after {self._config.init_timeout:.0f} seconds"))
        if self._api.init_error is None:
            self.init_ms = (time.perf_counter() - self._started) * 1e3
        self.used = time.monotonic()
        return self._api.init_error

    def invoke(self, request_id: str, payload: bytes) -> Outcome:
        """The function's answer. Over its time the process is killed; it serves no further request then (`alive`)."""
        timeout = self._config.timeout
        arn = f"arn:aws:lambda:us-east-1:000000000000:function:{self._config.name}"
        trace = f"Root=1-{int(time.time()):08x}-{uuid.uuid4().hex[:24]};Parent={uuid.uuid4().hex[:16]};Sampled=0"
        self._api.give(Work(request_id, payload, int((time.time() + timeout) * 1e3), arn, trace))
        try:
            outcome = self._api.outcomes.get(timeout=timeout)
        except queue.Empty:
            self._process.kill()
            self._process.wait(10)
            return _failure(TIMED_OUT, f"{request_id} Task timed out after {timeout:.2f} seconds")
        self.used = time.monotonic()
        return outcome

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def peak_bytes(self) -> int:
        """The most memory that the process has had resident; 0 where it is gone."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) << 10
        return 0

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        for line in self._process.stdout:
            self._line(line.decode(errors="replace").rstrip("\n"))

    def _watch(self) -> None:
        code = self._process.wait()
        outcome = _failure(EXITED, f"Runtime exited with {f'signal {-code}' if code < 0 else f'status {code}'}")
        self._api.fail_init(outcome)
        self._api.outcomes.put(outcome)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait(10)
        self._api.close()
        for thread in self._threads:
            thread.join(10)
        if self._process.stdout is not None:
            self._process.stdout.close()


class Environments:
    """The environments of one function. Safe to use by any number of threads."""

    def __init__(self, config: FunctionConfig, *, report: Callable[[Report], None], line: Lines) -> None:
        self.config = config
        self._report = report
        self._line = line
        self._lock = threading.Lock()
        self._made = threading.Condition(self._lock)
        self._idle: list[Environment] = []
        self._all: set[Environment] = set()
        self._starting = 0  # places taken by environments that are not made yet
        self._closed = threading.Event()
        self._reaper = threading.Thread(target=self._reap, daemon=True)
        self._reaper.start()

    def provision(self) -> None:
        """Starts the provisioned environments, all at once, and waits for them. Raises `RuntimeError` where one fails."""
        started = [self._new("provisioned-concurrency") for _ in range(self.config.provisioned)]
        for environment in started:
            if (failed := environment.start()) is not None:
                raise RuntimeError(f"a provisioned environment did not start: {failed.payload.decode(errors='replace')[:2000]}")
            self._line(f"INIT_REPORT Init Duration: {environment.init_ms:.1f} ms  Type: provisioned-concurrency")
            with self._lock:
                self._idle.append(environment)

    def count(self) -> int:
        with self._lock:
            return len(self._all)

    def pids(self) -> list[int]:
        with self._lock:
            return [environment.pid for environment in self._all]

    def invoke(self, payload: bytes) -> Outcome:
        """Runs the function on the payload, in an idle environment or a new one."""
        request_id = str(uuid.uuid4())
        environment = self._take()
        if environment is None:
            return _failure(THROTTLED, "Rate Exceeded.")
        init_ms = None
        if environment.init_ms is None:  # it is new
            if (failed := environment.start()) is not None:
                self._line(f"INIT_REPORT Status: error  Error Type: {failed.error}")
                self._drop(environment)
                return failed
            init_ms = environment.init_ms
        began = time.perf_counter()
        outcome = environment.invoke(request_id, payload)
        duration = (time.perf_counter() - began) * 1e3
        report = Report(request_id, duration, init_ms, environment.peak_bytes(), outcome.error)
        self._put_back(environment)
        self._report(report)
        return outcome

    def _take(self) -> Environment | None:
        """An idle environment, the one used last; else a new one, where there is place for it."""
        with self._lock:
            while self._idle:
                environment = self._idle.pop()
                if environment.alive:
                    return environment
                self._all.discard(environment)
                threading.Thread(target=environment.close, daemon=True).start()
            if self._closed.is_set() or len(self._all) + self._starting >= self.config.max_concurrency:
                return None
            self._starting += 1
        try:
            return self._new("on-demand")
        finally:
            with self._made:
                self._starting -= 1
                self._made.notify_all()

    def _new(self, initialization: Initialization) -> Environment:
        environment = Environment(self.config, initialization, self._line)
        with self._lock:
            self._all.add(environment)
        return environment

    def _put_back(self, environment: Environment) -> None:
        if environment.alive and not self._closed.is_set():
            with self._lock:
                self._idle.append(environment)
        else:
            self._drop(environment)

    def _drop(self, environment: Environment) -> None:
        with self._lock:
            self._all.discard(environment)
        environment.close()

    def _reap(self) -> None:
        while not self._closed.wait(min(self.config.idle / 2, 5.0)):
            before = time.monotonic() - self.config.idle
            with self._lock:
                old = [e for e in self._idle if e.used < before and e.initialization == "on-demand"]
                self._idle = [e for e in self._idle if e not in old]
            for environment in old:
                self._drop(environment)

    def close(self) -> None:
        """Ends every process."""
        with self._lock:
            self._closed.set()
        self._reaper.join(10)
        with self._made:  # one that is being made is ended, too
            self._made.wait_for(lambda: self._starting == 0, 10)
            left, self._idle = list(self._all), []
        for environment in left:
            self._drop(environment)


def _failure(kind: str, message: str) -> Outcome:
    return Outcome(json.dumps({"errorMessage": message, "errorType": kind}).encode(), kind)
