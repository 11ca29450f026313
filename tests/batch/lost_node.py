"""A run on two nodes of which one is lost: python -m tests.batch.lost_node REPOSITORY FOLDER replaced|gone.

In a process of its own, because a process is in one Ray cluster only. The head has no CPU: whatever scores can be lost.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.batch.workbench import Workbench, assert_each_row_once

FILES, ROWS = 40, 4000
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


def recorded(bench: Workbench) -> int:
    return len(list(bench.output.glob("run=*/_parts/[0-9]*.json")))


def main(repository: Path, root: Path, *, replaced: bool) -> None:
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: list[Any] = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    bench = Workbench(root, repository)
    for i in range(FILES):
        bench.write(f"{i:02d}.parquet", i * ROWS, ROWS)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: bench.run(actors=2))
        while recorded(bench) < 3:
            assert not running.done(), running.result()
            time.sleep(0.01)
        lost_at = recorded(bench)
        cluster.remove_node(nodes[0], allow_graceful=False)
        if replaced:
            cluster.add_node(num_cpus=1)
        summary = running.result()
    assert_each_row_once(summary.folder, FILES * ROWS)
    assert lost_at < FILES, "the run was over before the node was lost"
    assert "done at attempt" not in bench.said, bench.said  # a lost node counts against no part
    print(f"lost a node after {lost_at} of {FILES} parts")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), replaced=sys.argv[3] == "replaced")
