"""`python -m infra.layers build`. Exit codes: 0 built, 1 something failed, 2 wrong use or beyond Lambda's limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infra.layers.build import LIMIT_BYTES, Built, Wanted, megabytes
from infra.layers.build import build as build_layers
from infra.layers.target import Target
from triform.cli.output import make_table, run_app
from triform.settings import Settings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def root() -> None:
    """The layers of the Lambda form."""


@app.command()
def build(
    arch: Annotated[str, typer.Option(help="x86_64 or arm64")] = "x86_64",
    python: Annotated[str, typer.Option(help="the Python of the Lambda runtime")] = "3.13",
    model: Annotated[
        list[str] | None,
        typer.Option(help="name (every version of its release), name@stable or name/3; may be given again"),
    ] = None,
    repository: Annotated[str | None, typer.Option(help="the model repository")] = None,
    each: Annotated[bool, typer.Option("--each", help="a layer for each model too, for functions of one model")] = False,
    code: Annotated[list[Path] | None, typer.Option(help="a Python package of yours for core, such as processors")] = None,
    other_layers: Annotated[int, typer.Option(min=0, help="how many other layers the functions have: they count too")] = 0,
    out: Annotated[Path, typer.Option(help="where to build")] = Path("build/layers"),
) -> None:
    """Build the layers runtime, powertools, core and models, and print what they weigh."""
    wanted = Wanted(
        target=Target(arch, python),
        refs=tuple(model or ()),
        each=each,
        code=tuple(code or ()),
        other_layers=other_layers,
    )
    opened = Settings.from_env(os.environ, repository=repository).open_repository() if model else None
    show(build_layers(wanted, out.resolve(), opened), wanted, Console())


def show(built: Built, wanted: Wanted, console: Console) -> None:
    """The table of sizes, and what is to be known before a deployment."""
    rows = [
        (name, weight.files, megabytes(weight.unzipped), megabytes(weight.zipped), _heaviest(weight.heaviest))
        for name, weight in built.layers.items()
    ]
    shared = [weight for name, weight in built.layers.items() if not name.startswith("models-")]
    total = sum(weight.unzipped for weight in shared)
    rows.append(("together", sum(w.files for w in shared), megabytes(total), megabytes(sum(w.zipped for w in shared)), ""))
    title = f"Layers for {built.arch}, Python {built.python} (of {megabytes(LIMIT_BYTES)})"
    console.print(make_table("layer", "files", "unzipped", "zipped", "largest file", rows=rows, title=title, unfolded=1))
    for model, pinned in built.models.items():
        served = ", ".join(f"{alias} {version}" for alias, version in pinned.aliases.items())
        told = f"release {pinned.revision}" if pinned.revision else "no release"
        console.print(f"{model}: {served} ({told})", markup=False, highlight=False, soft_wrap=True)
    for name in built.left_out:
        told = f"{name} is not in core: it needs more than the layers have (infra/lambda/Dockerfile)"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    if not built.bytecode:
        console.print(
            f"No bytecode: there is no python{built.python} on this machine. The layers work, and a cold start compiles what it "
            "imports.",
            style="yellow",
            soft_wrap=True,
        )
    for warning in wanted.target.warnings():
        console.print(warning, style="yellow", markup=False, soft_wrap=True)


def _heaviest(files: dict[str, int]) -> str:
    name, size = next(iter(files.items()), ("", 0))
    return f"{name.rsplit('/', 1)[-1]} {megabytes(size)}" if name else ""


def main() -> None:
    run_app(app)
