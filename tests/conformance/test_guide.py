"""The examples of docs/protocols.md, run as they stand there, by a shell and its curl."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.conformance.models import surface
from tests.conformance.server import serve

GUIDE = (Path(__file__).parents[2] / "docs/protocols.md").read_text()
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL))
EXAMPLES = re.findall(r"^(?!#)(.+)\n((?:# .*\n)+)", SHELL, re.MULTILINE)


@pytest.fixture(scope="module")
def address(online_models: Path) -> Iterator[str]:
    with serve(surface(online_models)) as address:
        yield address


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize(("command", "expected"), EXAMPLES)
def test_an_example_of_the_guide(address: str, command: str, expected: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command],
        env={"HOST": address, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.rstrip("\n") == expected.replace("# ", "").rstrip("\n")


def test_every_command_of_the_guide_shows_its_answer() -> None:
    assert len(EXAMPLES) == SHELL.count("$HOST") == 11


def test_the_example_with_triton_client(address: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    said = io.StringIO()
    with redirect_stdout(said):
        exec(code, {"HOST": address})  # noqa: S102 - our own page
    assert said.getvalue() == "[[14.]\n [32.]]\n"
