"""Drivers on S3 that crash or race, without Ray: python -m tests.batch.crashes_s3 crash|race REPOSITORY FOLDER BUCKET.

`crash`: for each k, one driver is ended (os._exit) just before its k-th request that writes, then the same command runs again.
Fails unless each row is there once. `race`: three drivers at once do the same run. As in crashes.py, in forks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from botocore.httpsession import URLLib3Session

from tests.batch.crashes import CRASHED, FILES, ROWS, ended, in_child, race_with
from tests.batch.workbench import RemoteWorkbench, assert_each_row_once

WRITES = {"PUT", "POST", "DELETE"}


def crash_before(k: int) -> None:
    send, seen = URLLib3Session.send, 0

    def counting(session: URLLib3Session, request: Any) -> Any:
        nonlocal seen
        if request.method in WRITES:
            seen += 1
            if seen == k:
                os._exit(CRASHED)
        return send(session, request)

    URLLib3Session.send = counting


def finish_and_check(bench: RemoteWorkbench) -> None:
    summary = bench.score_and_run()
    assert_each_row_once(bench.fetch(summary.folder), ROWS)
    keys = bench.listed()
    assert {key.split("/")[1] for key in keys if "/run=" in key} == {summary.folder.rpartition("/")[2]}
    assert [key for key in keys if "/_open/" in key or "/_tmp/" in key] == []
    assert "Uploads" not in bench.client.list_multipart_uploads(Bucket=bench.bucket)


def begun(root: Path, repository: Path, bucket: str) -> RemoteWorkbench:
    bench = RemoteWorkbench(root, repository, bucket)
    for key in bench.listed():
        bench.client.delete_object(Bucket=bucket, Key=key)
    return bench


def crash_everywhere(repository: Path, root: Path, bucket: str) -> int:
    """The number of moments at which a driver was ended."""
    k = 0
    while True:
        k += 1

        def work(k: int = k) -> None:
            bench = begun(root, repository, bucket)
            crash_before(k)
            bench.score_and_run()

        def check(k: int = k) -> None:
            bench = RemoteWorkbench(root / str(k), repository, bucket)
            keys = bench.listed()
            data = [key for key in keys if "/data/part-" in key]
            done = [key for key in keys if key.endswith("/data/_SUCCESS")]
            assert not done or len(data) == FILES, f"crash {k}: marked as done without its data"
            finish_and_check(bench)

        code = ended(in_child(work))
        if code == 0:
            return k - 1
        assert code == CRASHED, f"crash {k}: the driver ended with {code}"
        assert ended(in_child(check)) == 0, f"crash {k}: the same command did not finish"


def race(repository: Path, root: Path, bucket: str) -> None:
    race_with(lambda: RemoteWorkbench(root, repository, bucket), finish_and_check)


if __name__ == "__main__":
    mode, repository, folder, bucket = sys.argv[1:]
    if mode == "crash":
        print(crash_everywhere(Path(repository), Path(folder), bucket))
    else:
        race(Path(repository), Path(folder), bucket)
