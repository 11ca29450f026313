"""IAM policies for a model repository on S3, as JSON: `python -m infra.iam s3://bucket/prefix --role publisher`.

reader      loads models: servers, batch jobs                 releaser   writes revisions of release logs
publisher   packages models                                   pruner     removes versions that nothing keeps
bucket      the bucket's own policy, for whoever has whatever role: TLS, conditional writes, no deletes but the pruner's

In the repository every role is denied what it has no use for, whatever else is attached to it: deletes, and writes that could
replace something. Blobs alone may be written again, because a packager renews their age; they are named by their content, and
hashed when they are read.

Source: Amazon S3 User Guide, "Enforce conditional writes on Amazon S3 buckets".
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec
import typer

from triform.cli.output import run_app
from triform.errors import InvalidRequest
from triform.stores.s3 import split

Statement = dict[str, Any]
BLOBS: Final = "blobs/*"
MANIFESTS: Final = "manifest.json"
SAID: Final = ("releases/*", "claims/*", "pruned/*")  # who said what when: for ever
WRITES: Final[Mapping[str, Sequence[str]]] = {
    "reader": (),
    "publisher": (BLOBS, MANIFESTS),
    "releaser": ("releases/*", "claims/*"),
    "pruner": ("claims/*", "pruned/*"),
}
DELETES: Final = "s3:DeleteObject*"
# A write that makes an object (PutObject, the end of one in pieces) and has no If-None-Match.
UNCONDITIONAL: Final = {"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class RoleName(StrEnum):
    READER = "reader"
    PUBLISHER = "publisher"
    RELEASER = "releaser"
    PRUNER = "pruner"
    BUCKET = "bucket"


class _Place:
    """The repository's ARNs."""

    def __init__(self, location: str) -> None:
        self.name, prefix = split(location.rstrip("/") + "/")
        if any(c in "*?$" for c in prefix):
            raise InvalidRequest(f"{location}: a policy takes '*', '?' and '$' for something else")
        self.prefix = prefix
        self.bucket = f"arn:aws:s3:::{self.name}"

    def models(self, *below: str) -> list[str]:
        """What lies below any model's folder."""
        return [f"{self.bucket}/{self.prefix}*/{name}" for name in below]

    @property
    def everything(self) -> str:
        return f"{self.bucket}/{self.prefix}*"


def policy(role: RoleName, location: str, *, pruner: str | None = None) -> dict[str, Any]:
    """The policy of a role for the repository at s3://bucket/prefix. `pruner`: the ARN of its role, for the bucket's own policy.

    Raises `InvalidRequest`, `ConfigurationError`.
    """
    place = _Place(location)
    if role is RoleName.BUCKET:
        return _document(_of_bucket(place, pruner))
    writes = WRITES[role]
    statements = [
        {**_allow("Find", "s3:ListBucket", [place.bucket]), "Condition": {"StringLike": {"s3:prefix": [f"{place.prefix}*"]}}},
        _allow("Read", "s3:GetObject", [place.everything]),
    ]
    if writes:
        statements.append(_allow("Write", "s3:PutObject", place.models(*writes)))
        once = place.models(*(name for name in writes if name != BLOBS))
        statements.append(_deny("NothingIsReplaced", "s3:PutObject", once, UNCONDITIONAL))
    else:
        statements.append(_deny("NothingIsWritten", "s3:PutObject", [place.everything]))
    if BLOBS in writes:
        statements.append(_allow("EndUploads", "s3:AbortMultipartUpload", place.models(BLOBS)))
    if role is RoleName.PRUNER:
        statements.append(_allow("Remove", "s3:DeleteObject", place.models(BLOBS, MANIFESTS)))
        statements.append(_deny("WhatWasSaidStays", DELETES, place.models(*SAID)))
    else:
        statements.append(_deny("NothingIsRemoved", DELETES, [place.everything]))
    return _document(statements)


def _of_bucket(place: _Place, pruner: str | None) -> list[Statement]:
    plain = {"Bool": {"aws:SecureTransport": "false"}}
    stranger = {"ArnNotEquals": {"aws:PrincipalArn": pruner}} if pruner is not None else None
    statements = [
        _deny("OverTlsOnly", "s3:*", [place.bucket, f"{place.bucket}/*"], plain),
        _deny("NothingIsReplaced", "s3:PutObject", place.models(*SAID, MANIFESTS), UNCONDITIONAL),
        _deny("NothingIsRemoved", DELETES, [place.everything], stranger),
        _deny("WhatWasSaidStays", DELETES, place.models(*SAID)),
    ]
    return [{**statement, "Principal": "*"} for statement in statements]


def _allow(sid: str, action: str, resources: list[str]) -> Statement:
    return {"Sid": sid, "Effect": "Allow", "Action": action, "Resource": resources}


def _deny(sid: str, action: str, resources: list[str], condition: Mapping[str, Any] | None = None) -> Statement:
    return {
        "Sid": sid,
        "Effect": "Deny",
        "Action": action,
        "Resource": resources,
        **({"Condition": condition} if condition else {}),
    }


def _document(statements: list[Statement]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": statements}


@app.command()
def main(
    repository: Annotated[str, typer.Argument(metavar="s3://BUCKET/PREFIX", help="the model repository")],
    role: Annotated[RoleName, typer.Option(help="whose policy")],
    pruner: Annotated[str | None, typer.Option(metavar="ARN", help="for the bucket's policy: the role that may prune")] = None,
) -> None:
    """Print the policy."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(policy(role, repository, pruner=pruner)), indent=2).decode() + "\n")


if __name__ == "__main__":
    run_app(app)
