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
models, path, rows, digest = sys.argv[1:]
file = Path(path)
part = Part(0, path, file.stat().st_size, digest, (0,), 0, int(rows))
predictor = Predictor.load(open_repository(models).package("linear", 1))
score_part(part, predictor, Layout(key=("id",)), data=file.with_suffix(".data"), dead_letters=file.with_suffix(".dead"))
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("rows", [4_000_000, pytest.param(20_000_000, marks=pytest.mark.slow)])
def test_one_huge_row_group_needs_no_more_memory_than_a_small_one(tmp_path: Path, rows: int) -> None:
    config = {"linear": '[inputs.x]\ncolumns = ["a", "b", "c"]\n'}
    testing.repository(tmp_path / "models", {"linear": testing.linear(tmp_path / "linear.onnx")}, config=config)
    peaks = []
    for size in 400_000, rows:
        x = np.random.default_rng(1).standard_normal((3, size), dtype=np.float32)
        file = tmp_path / f"{size}.parquet"
        pq.write_table(pa.table({"id": np.arange(size), "a": x[0], "b": x[1], "c": x[2]}), file, row_group_size=size)
        assert pq.read_metadata(file).num_row_groups == 1
        args = [str(tmp_path / "models"), str(file), str(size), fingerprint(file)]
        done = subprocess.run([sys.executable, "-c", CHILD, *args], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) >> 10)
    print(f"peaks {peaks} MB; the larger file has {rows * 20 >> 20} MB")
    assert peaks[1] < peaks[0] + 60
