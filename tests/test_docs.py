"""What a user can call, set, see or get is documented, and the documents point at things that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
import typer.main

from batch.cli import app as batch_app
from loadtests.__main__ import app as load_app
from ray_apps.__main__ import app as serve_app
from ray_apps.arguments import Arguments
from ray_apps.environment import TUNED
from triform.cli.app import app
from triform.errors import TriformError
from triform.settings import Settings
from triform.telemetry import VOCABULARY

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs/reference.md").read_text()
SERVE = (ROOT / "docs/serve.md").read_text()
BATCH = (ROOT / "docs/batch.md").read_text()
LOAD = (ROOT / "docs/load-testing.md").read_text()
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def commands(group: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    children = getattr(group, "commands", None)
    if children is None:
        yield path, group
        return
    for name, child in children.items():
        yield from commands(child, f"{path} {name}")


def error_codes(kind: type[TriformError] = TriformError) -> Iterator[str]:
    yield kind.code
    for child in kind.__subclasses__():
        yield from error_codes(child)


COMMANDS = [
    *commands(typer.main.get_command(app), "triform"),
    *commands(typer.main.get_command(batch_app), "python -m batch"),
    *commands(typer.main.get_command(serve_app), "python -m ray_apps"),
    *commands(typer.main.get_command(load_app), "python -m loadtests"),
]


@pytest.mark.parametrize("name", [name for name, _ in COMMANDS])
def test_every_command_is_in_the_reference(name: str) -> None:
    assert f"`{name}" in REFERENCE


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_option_is_documented_and_explains_itself(name: str, command: click.Command) -> None:
    pages = REFERENCE + {"python -m batch": BATCH, "python -m loadtests": LOAD}.get(" ".join(name.split()[:3]), "")
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert f"`{parameter.opts[0]}`" in pages, f"{name} {parameter.opts[0]}"
            assert getattr(parameter, "help", None), f"{name} {parameter.opts[0]} has no help"


def test_every_argument_of_build_app_is_in_its_guide() -> None:
    assert [f.name for f in msgspec.structs.fields(Arguments) if f"`{f.name}`" not in SERVE] == []


def test_every_variable_that_ray_is_started_with_is_in_its_guide() -> None:
    assert [name for name in TUNED if not re.search(rf"^\|.*`{name}`", SERVE, re.MULTILINE)] == []


@pytest.mark.parametrize("page", ["docs/serve.md", "docs/gpu.md", "README.md", "infra/ray/Dockerfile"])
def test_what_a_page_starts_knows_who_may_call(page: str) -> None:
    """Serve does not start otherwise."""
    text = (ROOT / page).read_text()
    scripts = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = re.sub(r"```sh\n.*?```", "", text, flags=re.DOTALL).splitlines()
    started = [step for step in scripts + lines if re.search(r"ray_apps --repository|serve deploy ray_apps|docker run.*-e", step)]
    assert started
    assert [step for step in started if not re.search(r"--allow-anonymous|TRIFORM_API_KEYS", step)] == []


def test_every_setting_is_in_the_reference() -> None:
    missing = [f.name for f in msgspec.structs.fields(Settings) if f"`TRIFORM_{f.name.upper()}`" not in REFERENCE]
    assert missing == []


def test_every_metric_is_in_the_reference_with_its_labels() -> None:
    missing = [m.name for m in VOCABULARY if f"| `{m.name}` | {m.kind} | {', '.join(m.labels)} |" not in REFERENCE]
    assert missing == []


def test_every_error_code_is_in_the_reference() -> None:
    assert [code for code in error_codes() if f"`{code}`" not in REFERENCE] == []


def test_make_bench_runs_every_benchmark_that_a_page_shows() -> None:
    """But for where it reads and writes."""

    def what(command: str) -> str:
        return re.sub(r" --(plot|to|markdown|repository|model) \S+", "", command)

    script = re.search(r"^bench: .*?^\t@for name in (.*?);", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)
    assert script
    run = {what(word) for word in shlex.split(script[1].replace("\\\n", " "))}
    shown = {what(c) for page in DOCS for c in re.findall(r"`python -m benchmarks\.([^`]+)`", page.read_text())}
    assert len(shown) > 12
    assert shown - run == set()
    scripts = {p.stem for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()} - {"generate_tpch"}
    assert {name.partition(" ")[0] for name in run} == scripts


@pytest.mark.parametrize("page", DOCS, ids=[str(p.relative_to(ROOT)) for p in DOCS])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
