"""The alert rules: known to Prometheus, about metrics that exist, and silent or loud when they should be."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from triform.telemetry import VOCABULARY

HERE = Path(__file__).parent
ALERTS = HERE.parent.parent / "infra/ray/alerts.yaml"


@pytest.fixture
def promtool(debian: Callable[..., Path]) -> Callable[..., str]:
    def run(*args: object) -> str:
        program = debian("promtool", package="prometheus")
        done = subprocess.run([program, *map(str, args)], capture_output=True, text=True, timeout=60, check=False, cwd=HERE)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_prometheus_reads_the_rules(promtool: Callable[..., str]) -> None:
    assert "4 rules found" in promtool("check", "rules", ALERTS)


def test_alerts_fire_when_they_should_and_only_then(promtool: Callable[..., str]) -> None:
    promtool("test", "rules", "alerts_test.yaml")


def test_every_metric_and_label_of_a_rule_exists() -> None:
    labels = {metric.name: set(metric.labels) for metric in VOCABULARY}
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            found = re.findall(r"(triform_\w+)\{(.*?)\}", rule["expr"])
            assert found, rule["alert"]
            assert len(found) == rule["expr"].count("triform_")
            for name, matchers in found:
                assert set(re.findall(r"(\w+)=", matchers)) <= labels[name], rule["alert"]
