"""A run's checks as JUnit XML, which CI shows: Result + checks -> file content."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from xml.etree.ElementTree import Element, SubElement, tostring

from loadtests.results import Result
from loadtests.thresholds import Check
from triform.cli.output import printable


def junit(found: Result, checks: Sequence[Check]) -> bytes:
    """One test case a check; what was found stands in its output, or in its failure."""
    broken = sum(not check.kept for check in checks)
    name = f"loadtests.{found.target}.{found.shape}"
    began = datetime.fromtimestamp(found.began, UTC).replace(microsecond=0, tzinfo=None).isoformat()
    counts = {"tests": str(len(checks)), "failures": str(broken), "errors": "0", "skipped": "0", "time": f"{found.seconds:.3f}"}
    suites = Element("testsuites", {"name": "loadtests", **counts})
    suite = SubElement(suites, "testsuite", {"name": name, "timestamp": began, **counts})
    for check in checks:
        case = SubElement(suite, "testcase", {"name": check.name, "classname": name, "time": "0"})
        said = printable(check.said)
        if check.kept:
            SubElement(case, "system-out").text = said
        else:
            SubElement(case, "failure", {"message": said, "type": "threshold"}).text = said
    content: bytes = tostring(suites, encoding="utf-8", xml_declaration=True)
    return content
