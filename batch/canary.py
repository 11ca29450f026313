"""`run --split`: a run whose rows stable and canary share, each row by the version of its key, as callers online are.

    release in force, its canary and key column -> pin: both packages fit each other and the input -> PinnedCanary, in the plan
        -> actor.py loads both -> triform/row_split.py

A release without a canary makes a run without one. The run keeps what it has pinned, wherever the rollout goes meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pyarrow as pa

from triform import arrow
from triform.errors import ConfigurationError, InvalidInput
from triform.features import Features
from triform.package import ModelPackage
from triform.releases import Release, ReleaseLog
from triform.repository import ModelRepository, Ref
from triform.runs import inputs
from triform.runs.commit import RunManifest
from triform.runs.inputs import InputFile
from triform.runs.plan import Pinned, PinnedCanary
from triform.scoring import Layout
from triform.sources import plain_field
from triform.splitting import TrafficSplit

KEYS: Final = (
    pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary,
    pa.types.is_null,  # of a file in which nobody has a key
)  # fmt: skip


def release_of(repository: ModelRepository, model: str) -> Release:
    """The release in force. Raises `ConfigurationError` where the model is named with a version, which knows of no split."""
    ref = Ref.parse(model)
    if ref.version is not None or ref.alias not in (None, "stable"):
        raise ConfigurationError(f"split: the release says whose a row is, so name the model as {ref.model}, not as {ref}")
    return ReleaseLog(repository, ref.model).in_force()


def pin(
    repository: ModelRepository, release: Release, stable: ModelPackage, files: Sequence[tuple[InputFile, pa.Schema]]
) -> PinnedCanary | None:
    """The canary of the release, verified, and what its rows are known by; None where it has no canary with a share of the keys.

    Raises `ConfigurationError` where the key has no column or the versions answer different columns, `InvalidInput` for a column
    that the input lacks or that holds no keys, `PackageError`.
    """
    if release.canary is None or not release.canary.weight:
        return None
    manifest = stable.manifest
    column = (release.canary.key or manifest.config.key).column
    if column is None:
        raise ConfigurationError(
            f"split: the key of {manifest.name}'s release {release.revision} has no column, so no row has one: "
            f"`triform release set ... --key-column`, or `[key] column` in model.toml, names it"
        )
    package = repository.package(manifest.name, release.canary.version)
    package.verify("golden")
    ours, theirs = (Features(p.manifest.signature, p.manifest.config) for p in (stable, package))
    has = [", ".join(f"{f.name} {f.type}" for f in sorted(arrow.output_schema(side), key=str)) for side in (ours, theirs)]
    if has[0] != has[1]:
        raise ConfigurationError(
            f"split: one output cannot hold both versions' answers: {manifest.ref} answers {has[0]}; "
            f"{package.manifest.ref} {has[1]}"
        )
    try:
        inputs.check_columns(files, theirs, Layout())
    except InvalidInput as error:
        raise InvalidInput(f"split: of the canary, {package.manifest.ref}: {error}") from error
    _check_keys(files, column)
    traffic = TrafficSplit.of(release)
    pinned = Pinned(package.manifest.ref, package.manifest.digest)
    return PinnedCanary(canary=pinned, points=traffic.points, salt=release.salt, column=column, revision=release.revision)


def _check_keys(files: Sequence[tuple[InputFile, pa.Schema]], column: str) -> None:
    for file, schema in files:
        if schema.names.count(column) > 1:
            raise InvalidInput(f"{file.path}: the column '{column}', whose keys split the rows, is there twice")
        if column not in schema.names:
            has = ", ".join(schema.names)
            raise InvalidInput(f"{file.path}: no column '{column}', whose keys split the rows (it has: {has})")
        kind = plain_field(schema.field(column)).type
        words = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(is_key(words) for is_key in KEYS):
            raise InvalidInput(f"{file.path}: column '{column}' is {kind}; a key is text or a whole number")


def told(split: PinnedCanary) -> str:
    """For a person."""
    return f"{split.canary.ref} with {split.points / 100:g}% of the keys in '{split.column}' (release {split.revision})"


def canarys_share(done: RunManifest) -> str:
    """What came of it, for a person."""
    if done.split is None:
        return ""
    reasons = ", ".join(f"{code} {rows:,}" for code, rows in done.instead.items())
    instead = (
        f"; stable answered {sum(done.instead.values()):,} more of its keys, which it did not ({reasons})" if reasons else ""
    )
    return f"{told(done.split)}: {done.rows_canary:,} of {done.rows_out:,} rows{instead}"
