"""What a target counts about itself, from its page for Prometheus, and what a real Prometheus has seen of it.

GET .../metrics -> Endpoint: requests by code, time in queues          prometheus(url, folder) -> Prometheus: the same, queried
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from infra.local.processes import background
from ray_apps.ports import free_ports
from triform.errors import ConfigurationError, TriformError

ROOT: Final = Path(__file__).parent.parent
LINE: Final = re.compile(
    r"^((?:ray_)?triform_(requests_total|stage_seconds_sum|stage_seconds_count)\{(.*)\}) (\S+)$", re.MULTILINE
)
LABEL: Final = re.compile(r'(\w+)="([^"]*)"')
SCRAPE_SECONDS: Final = 1
STARTS_SECONDS: Final = 30.0
CONFIG: Final = """
global: {{scrape_interval: {seconds}s, scrape_timeout: {seconds}s}}
scrape_configs: [{{job_name: target, metrics_path: {path}, scheme: {scheme}, static_configs: [{{targets: ["{netloc}"]}}]}}]
"""


class Endpoint:
    """A page of metrics. What was seen of a replica that is gone since still counts. Safe to use by several threads."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self._model = model
        self._series: dict[str, tuple[str, dict[str, str], float]] = {}
        self._reading = threading.Lock()

    def read(self) -> None:
        """Looks at the page. Raises `OSError` where it cannot be had."""
        text = get(self.url)
        with self._reading:
            for series, name, labels, value in LINE.findall(text):
                told = dict(LABEL.findall(labels))
                if told.get("model") == self._model:
                    self._series[series] = name, told, float(value)

    def requests(self) -> dict[str, int]:
        """Requests for the model by code, as of the latest look."""
        counted: dict[str, int] = {}
        with self._reading:
            for name, labels, value in self._series.values():
                if name == "requests_total":
                    counted[labels["code"]] = counted.get(labels["code"], 0) + round(value)
        return counted

    def queued(self) -> tuple[float, float]:
        """Seconds that requests have waited for their model so far, and how many requests that were."""
        with self._reading:
            queue = [(name, value) for name, labels, value in self._series.values() if labels.get("stage") == "queue"]
        return tuple(sum(v for n, v in queue if n == f"stage_seconds_{part}") for part in ("sum", "count"))  # type: ignore[return-value]


class Prometheus:
    """Use `prometheus`."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self._model = model

    def requests(self) -> dict[str, int]:
        """Requests for the model by code, as it has scraped them last. Raises `OSError`."""
        metric = f'{{__name__=~"(ray_)?triform_requests_total", model="{self._model}"}}'
        query = urllib.parse.urlencode({"query": f"sum by (code) (last_over_time({metric}[1d]))"})
        answer = json.loads(get(f"{self.url}/api/v1/query?{query}"))
        return {one["metric"]["code"]: round(float(one["value"][1])) for one in answer["data"]["result"]}


@contextmanager
def prometheus(url: str, model: str, folder: Path) -> Iterator[Prometheus]:
    """Debian's Prometheus on loopback, which scrapes the page at `url` every second for as long as the block lasts; `folder` gets
    its data. Raises `ConfigurationError` where the package cannot be had, `TriformError` where it does not start."""
    program = _program()
    to = urlsplit(url)
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(seconds=SCRAPE_SECONDS, path=to.path or "/metrics", scheme=to.scheme, netloc=to.netloc))
    (port,) = free_ports(1)
    command = [
        program,
        f"--config.file={config}",
        f"--web.listen-address=127.0.0.1:{port}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
    ]
    log = folder / "prometheus.log"
    with background(command, log) as process:
        made = Prometheus(f"http://127.0.0.1:{port}", model)
        _await(made, process, log)
        yield made


def _program() -> Path:
    try:
        done = subprocess.run([ROOT / "infra/debian.sh", "prometheus"], capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigurationError(f"--prometheus: infra/debian.sh cannot fetch it: {error}") from error
    if done.returncode:
        raise ConfigurationError(f"--prometheus: infra/debian.sh cannot fetch it: {done.stderr.strip()[-300:]}")
    return Path(done.stdout.strip()) / "prometheus"


def _await(made: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers, and has scraped once."""
    deadline = time.monotonic() + STARTS_SECONDS
    while True:
        with suppress(OSError, ValueError):
            up = json.loads(get(f"{made.url}/api/v1/query?query=up"))["data"]["result"]
            if up and up[0]["value"][1] == "1":
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise TriformError(f"Prometheus did not start, or cannot scrape: {log.read_text(errors='replace')[-300:]}")
        time.sleep(0.1)


def get(url: str, timeout: float = 10.0) -> str:
    """The text at a URL. Raises `OSError` where there is none."""
    to = urlsplit(url)
    kind = http.client.HTTPSConnection if to.scheme == "https" else http.client.HTTPConnection
    connection = kind(to.hostname or "", to.port, timeout=timeout)
    try:
        connection.request("GET", f"{to.path or '/'}{'?' if to.query else ''}{to.query}")
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise OSError(f"it answers {answer.status}: {text[:200]}")
    return text
