"""`triform`: package models, look at them, try them, release them. Exit codes: 0 ok, 1 a check failed, 2 wrong use.

model.py    package, inspect, verify, predict        releases.py    repo list, release set|show|log|rollback
prune.py    repo prune                              keys.py        keys new|list|revoke
audit.py    audit verify                            doctor.py      doctor
rollout.py  rollout replay
"""

from __future__ import annotations

import sys


def main() -> None:
    """The console script."""
    try:
        from triform.cli.app import run
    except ModuleNotFoundError as error:
        sys.exit(f"error: the command line needs {error.name}: install triform[cli]")
    run()
