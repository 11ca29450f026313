"""Memory while scoring depends on the batch, never on the file.

Measured as VmHWM in a child: `ru_maxrss` would begin at what its parent held.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triform import testing
from triform.sources import fingerprint

CHILD = """
import re, sys
from pathlib import Path
from triform.predictor import Predictor
from triform.repository import open_repository
from triform.scoring import Layout, Part, score_part
models, path, rows, digest, bound, *keep = sys.argv[1:]
file = Path(path)
part = Part(0, path, file.stat().st_size, digest, (0,), 0, int(rows))
predictor = Predictor.load(open_repository(models).package("linear", 1))
if bound:
    import resource
    now = int(re.search(r"VmData:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (now + int(bound), resource.RLIM_INFINITY))
paths = {"data": file.with_suffix(".data"), "dead_letters": file.with_suffix(".dead")}
print(score_part(part, predictor, Layout(key=("id",), keep=tuple(keep)), **paths).rows_out)
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
CONFIG = {"linear": '[inputs.x]\ncolumns = ["a", "b", "c"]\n'}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    testing.repository(tmp_path / "models", {"linear": testing.linear(tmp_path / "linear.onnx")}, config=CONFIG)
    return tmp_path / "models"


def score(models: Path, file: Path, *keep: str, bound: int | None = None) -> tuple[int, int]:
    """Rows that were answered, and the child's peak in MB. `bound`: bytes that it may take beyond what it has at the start."""
    rows = pq.read_metadata(file).num_rows
    args = [models, file, rows, fingerprint(file), bound or "", *keep]
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answered, peak = map(int, done.stdout.split())
    return answered, peak >> 10


@pytest.mark.parametrize("rows", [4_000_000, pytest.param(20_000_000, marks=pytest.mark.slow)])
def test_one_huge_row_group_needs_no_more_memory_than_a_small_one(tmp_path: Path, models: Path, rows: int) -> None:
    peaks = []
    for size in 400_000, rows:
        x = np.random.default_rng(1).standard_normal((3, size), dtype=np.float32)
        file = tmp_path / f"{size}.parquet"
        pq.write_table(pa.table({"id": np.arange(size), "a": x[0], "b": x[1], "c": x[2]}), file, row_group_size=size)
        assert pq.read_metadata(file).num_row_groups == 1
        peaks.append(score(models, file)[1])
    print(f"peaks {peaks} MB; the larger file has {rows * 20 >> 20} MB")
    assert peaks[1] < peaks[0] + 60


def of_text(file: Path, lengths: list[int], *, missing: int = 0) -> None:
    """Rows with a text of each length, the same for the same length; the first rows lack a value."""
    text = {length: "x" * length for length in set(lengths)}
    notes = pa.DictionaryArray.from_arrays(
        pa.array([list(text).index(n) for n in lengths], pa.int32()), pa.array(list(text.values()), pa.large_string())
    )
    a = [None if i < missing else 1.0 for i in range(len(lengths))]
    ones = np.ones(len(lengths), np.float32)
    table = pa.table({"id": np.arange(len(lengths)), "a": pa.array(a, pa.float32()), "b": ones, "c": ones, "note": notes})
    pq.write_table(table, file, row_group_size=len(lengths), dictionary_pagesize_limit=64 << 20, store_schema=False)


@pytest.mark.parametrize("missing", [0, 100])
def test_texts_that_a_dictionary_hides_are_read_a_few_at_a_time(tmp_path: Path, models: Path, missing: int) -> None:
    """4,096 rows of 1 MB in a file of 1 MB: with 16,384 rows a batch, as the footer suggests, they would be 4 GB."""
    rows = 4096
    of_text(tmp_path / "small.parquet", [1] * rows, missing=missing)
    of_text(tmp_path / "huge.parquet", [1 << 20] * rows, missing=missing)
    assert (tmp_path / "huge.parquet").stat().st_size < 2 << 20
    keep = ["note"] if not missing else []  # dead letters read all columns
    _, small = score(models, tmp_path / "small.parquet", *keep)
    answered, huge = score(models, tmp_path / "huge.parquet", *keep)
    print(f"peaks {small} and {huge} MB")
    assert answered == rows - missing
    assert huge < small + 700


def test_where_memory_runs_out_batches_become_smaller(tmp_path: Path, models: Path) -> None:
    """The first rows tell nothing of the others; those do not fit within the bound all at once, but some at a time they do."""
    file = tmp_path / "swelling.parquet"
    of_text(file, [1] * 16 + [100_000] * 8192)
    answered, peak = score(models, file, "note", bound=400 << 20)
    print(f"peak {peak} MB")
    assert answered == 16 + 8192
