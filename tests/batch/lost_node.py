"""A run on three nodes of which one is lost, and another that comes: python -m tests.batch.lost_node REPOSITORY FOLDER.

In a process of its own, because a process is in one Ray cluster only. The head has no CPU: what scores can be lost.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from tests.batch.killing import meanwhile
from tests.batch.workbench import Workbench, assert_each_row_once

FILES, ROWS = 40, 4000
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


def recorded(bench: Workbench) -> int:
    return len(list(bench.output.glob("run=*/_parts/[0-9]*.json")))


def main(repository: Path, root: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: list[Any] = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    bench = Workbench(root, repository)
    for i in range(FILES):
        bench.write(f"{i:02d}.parquet", i * ROWS, ROWS)
    lost_at: list[int] = []

    def lose(over: threading.Event) -> None:
        while recorded(bench) < 3 and not over.wait(0.01):
            pass
        lost_at.append(recorded(bench))
        cluster.remove_node(nodes[0], allow_graceful=False)
        if not over.wait(1):
            cluster.add_node(num_cpus=1)

    with meanwhile(lose):
        summary = bench.run(actors=2)
    assert_each_row_once(summary.folder, FILES * ROWS)
    assert lost_at[0] < FILES, "the run was over before the node was lost"
    assert "done at attempt" not in bench.said, bench.said  # a lost node counts against no part
    print(f"lost a node after {lost_at[0]} of {FILES} parts")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
