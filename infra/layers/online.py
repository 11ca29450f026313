"""Which modules of the checkout an online request may need: those whose imports the layers, Lambda or Python itself carry.

    triform/, handlers/ -> imports at module level, followed -> without what needs pyarrow, onnx, ... or a module that does

Imports within functions are lazy on purpose and count for nothing; so do those under `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

PACKAGES: Final = ("triform", "handlers")
OFFLINE: Final = ("triform.testing", "triform.cli")
LAMBDA_BRINGS: Final = frozenset({"boto3", "botocore", "awslambdaric", "snapshot_restore_py"})


def online_modules(root: Path, shipped: Collection[str]) -> dict[str, Path]:
    """The modules by dotted name; `shipped` names the packages of the other layers by what is imported."""
    files = {_dotted(path.relative_to(root)): path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))}
    files = {name: path for name, path in files.items() if name not in OFFLINE}
    imports = {name: set(_imported(ast.parse(path.read_text()).body)) for name, path in files.items()}
    at_hand = {*shipped, *LAMBDA_BRINGS, *sys.stdlib_module_names}
    kept = set(files)
    while out := {name for name in kept if not all(_met(wanted, kept, files, at_hand) for wanted in imports[name])}:
        kept -= out
        kept -= {name for name in kept if any(name.startswith(f"{gone}.") for gone in out)}  # a package's modules go with it
    return {name: files[name] for name in sorted(kept)}


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _met(wanted: str, kept: Collection[str], files: Collection[str], at_hand: Collection[str]) -> bool:
    """Whether an import of `package.module.name` would succeed: some leading part of it is a module of ours that is kept."""
    top = wanted.partition(".")[0]
    if top not in PACKAGES:
        return top in at_hand
    parts = wanted.split(".")
    names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return all(name in kept for name in names if name in files) and names[0] in kept


def _imported(body: list[ast.stmt]) -> Iterator[str]:
    for statement in body:
        match statement:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=orelse):
                yield from _imported(orelse)
            case ast.If(body=inner, orelse=orelse):
                yield from _imported([*inner, *orelse])
            case ast.Try(body=inner, orelse=orelse, finalbody=final):
                yield from _imported([*inner, *orelse, *final])
