"""The policies that are made for a repository: each role may do what its work asks of S3, and nothing that loses or replaces."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import botocore.client
import pytest

from infra.iam import RoleName, policy
from tests.infra.test_policy import NEEDS
from triform import testing
from triform.errors import ConfigurationError, InvalidRequest
from triform.packaging import package_model
from triform.predictor import Predictor
from triform.releases import ReleaseLog
from triform.repository import open_repository
from triform.retention import Policy, prune
from triform.stores import s3

PRUNER = "arn:aws:iam::111122223333:role/pruner"
OTHER = "arn:aws:iam::111122223333:role/somebody"
MAKES = {"PutObject": "true", "CompleteMultipartUpload": "true"}


class Asked(NamedTuple):
    """A request as a policy sees it."""

    action: str
    resource: str
    context: dict[str, str]


def some(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def holds(condition: dict[str, dict[str, Any]], context: dict[str, str]) -> bool:
    """IAM, "Condition operators"; a key that is not in the context matches nothing but Null and what is negated."""

    def one(operator: str, key: str, values: list[str]) -> bool:
        given = context.get(key)
        if operator == "Null":
            return (given is None) == (values == ["true"])
        if operator == "ArnNotEquals":
            return given not in values
        return given is not None and any(fnmatchcase(given, value) for value in values)

    return all(one(operator, key, some(v)) for operator, keys in condition.items() for key, v in keys.items())


def verdict(document: dict[str, Any], asked: Asked) -> str | None:
    """Allow, Deny, or None where the policy says nothing."""
    effects = {
        statement["Effect"]
        for statement in document["Statement"]
        if any(fnmatchcase(asked.action, action) for action in some(statement["Action"]))
        and any(fnmatchcase(asked.resource, resource) for resource in some(statement["Resource"]))
        and holds(statement.get("Condition", {}), asked.context)
    }
    return "Deny" if "Deny" in effects else "Allow" if effects else None


def allowed(role: str, asked: Asked, bucket: str, who: str = OTHER) -> bool:
    """By the role's own policy and the bucket's."""
    place = f"s3://{bucket}/teams/a"
    seen = asked._replace(context={**asked.context, "aws:PrincipalArn": who, "aws:SecureTransport": "true"})
    of_bucket = policy(RoleName.BUCKET, place, pruner=PRUNER)
    return verdict(policy(RoleName(role), place), seen) == "Allow" and verdict(of_bucket, seen) != "Deny"


def requests_of(operation: str, given: dict[str, Any]) -> list[Asked]:
    bucket, context = f"arn:aws:s3:::{given['Bucket']}", {}
    if operation.startswith("List"):
        return [Asked(NEEDS[operation], bucket, {"s3:prefix": given.get("Prefix", "")})]
    if NEEDS[operation] == "s3:PutObject":
        context["s3:ObjectCreationOperation"] = MAKES.get(operation, "false")
        if "IfNoneMatch" in given:
            context["s3:if-none-match"] = given["IfNoneMatch"]
    keys = [entry["Key"] for entry in given["Delete"]["Objects"]] if operation == "DeleteObjects" else [given["Key"]]
    return [Asked(NEEDS[operation], f"{bucket}/{key}", context) for key in keys]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[Asked]]:
    """`watch(work)`: what the work asks of S3, as boto3 sends it."""
    seen: list[Asked] = []
    call = botocore.client.BaseClient._make_api_call

    def watched(self: Any, operation: str, given: dict[str, Any]) -> Any:
        seen.extend(requests_of(operation, given))
        return call(self, operation, given)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", watched)

    def of(work: Callable[[], Any]) -> list[Asked]:
        seen.clear()
        work()
        return list(seen)

    return of


Watch = Callable[[Callable[[], Any]], list[Asked]]


def test_each_role_may_do_its_work_and_not_the_others(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    monkeypatch.setattr(s3, "SINGLE_BYTES", 100)  # so that blobs go in pieces
    repository = open_repository(f"s3://{s3_bucket}/teams/a", cache=tmp_path / "cache")

    def publish() -> None:
        for make in testing.linear, testing.lookup:
            package_model(make(tmp_path / "model.onnx"), name="linear", repository=repository)

    def release() -> None:
        log = ReleaseLog(repository, "linear")
        log.set(stable=2)
        assert [one.stable for one in log.history()] == [2]

    def read() -> None:
        assert repository.models() == ["linear"]
        Predictor.load(repository.package("linear", 2))

    def clear() -> None:
        done = prune(repository, "linear", Policy(revisions=1, versions=1, days=0), dry_run=False)
        assert [verdict.version for verdict in done.gone] == [1]

    steps = {"publisher": publish, "releaser": release, "reader": read, "pruner": clear}
    work = {role: watch(step) for role, step in steps.items()}
    for role, requests in work.items():
        refused = [one for one in requests if not allowed(role, one, s3_bucket, PRUNER if role == "pruner" else OTHER)]
        assert (role, refused) == (role, [])
        assert len(requests) > 2
    for role, requests in work.items():
        for other in set(work) - {role, "reader"}:
            if role != "reader":
                assert [one for one in requests if not allowed(other, one, s3_bucket, PRUNER)], (
                    f"{other} may do all that {role} does"
                )


def put(key: str, condition: str | None = "*", *, making: str = "true") -> Asked:
    context = {"s3:ObjectCreationOperation": making} | ({"s3:if-none-match": condition} if condition else {})
    return Asked("s3:PutObject", f"arn:aws:s3:::example-models/teams/a/{key}", context)


def delete(key: str, action: str = "s3:DeleteObject") -> Asked:
    return Asked(action, f"arn:aws:s3:::example-models/teams/a/{key}", {})


@pytest.mark.parametrize(
    ("role", "asked", "fits"),
    [
        ("publisher", put("churn/3/manifest.json"), True),
        ("publisher", put("churn/3/manifest.json", None), False),
        ("publisher", put("churn/3/manifest.json", None, making="false"), True),  # a piece of an upload makes nothing yet
        ("publisher", put("churn/blobs/abc", None), True),
        ("publisher", put("churn/releases/000001.json"), False),
        ("releaser", put("churn/releases/000001.json"), True),
        ("releaser", put("churn/releases/000001.json", None), False),
        ("releaser", put("churn/claims/1-000001.json", None), False),
        ("releaser", put("churn/blobs/abc"), False),
        ("releaser", put("churn/3/manifest.json"), False),
        ("reader", put("churn/blobs/abc"), False),
        *((role, delete("churn/3/manifest.json"), role == "pruner") for role in ("reader", "publisher", "releaser", "pruner")),
        *((role, delete("churn/releases/000001.json"), False) for role in ("reader", "publisher", "releaser", "pruner")),
        ("pruner", delete("churn/pruned/3.json"), False),
        ("pruner", delete("churn/3/manifest.json", "s3:DeleteObjectVersion"), False),
        ("pruner", put("churn/pruned/3.json", None), False),
        ("reader", Asked("s3:GetObject", "arn:aws:s3:::example-models/teams/b/churn/1/manifest.json", {}), False),
        ("reader", Asked("s3:ListBucket", "arn:aws:s3:::example-models", {"s3:prefix": "teams/b/"}), False),
        ("reader", Asked("s3:ListBucket", "arn:aws:s3:::example-models", {}), False),
    ],
)
def test_what_a_role_may_and_may_not(role: str, asked: Asked, fits: bool) -> None:
    assert allowed(role, asked, "example-models", PRUNER) == fits


def test_the_buckets_own_policy_binds_whoever_has_whatever_role() -> None:
    document = policy(RoleName.BUCKET, "s3://example-models/teams/a", pruner=PRUNER)

    def says(asked: Asked, who: str = OTHER, tls: str = "true") -> str | None:
        return verdict(document, asked._replace(context={**asked.context, "aws:PrincipalArn": who, "aws:SecureTransport": tls}))

    assert says(put("churn/3/manifest.json", None)) == says(put("churn/releases/000001.json", None)) == "Deny"
    assert says(put("churn/3/manifest.json")) is None
    assert says(put("churn/blobs/abc", None)) is None
    assert says(put("churn/3/manifest.json"), tls="false") == "Deny"
    assert says(delete("churn/3/manifest.json")) == "Deny"
    assert says(delete("churn/3/manifest.json"), PRUNER) is None
    assert says(delete("churn/releases/000001.json"), PRUNER) == "Deny"
    assert says(Asked("s3:DeleteObject", "arn:aws:s3:::example-models/elsewhere", {})) is None
    without = policy(RoleName.BUCKET, "s3://example-models/teams/a")
    assert verdict(without, delete("churn/3/manifest.json")._replace(context={"aws:PrincipalArn": PRUNER})) == "Deny"


@pytest.mark.parametrize(
    "location", ["models", "https://b/x", "s3://example-models/te*ms", "s3://example-models/${aws:username}", "s3://"]
)
def test_what_is_no_place_for_a_policy(location: str) -> None:
    with pytest.raises((InvalidRequest, ConfigurationError)):
        policy(RoleName.READER, location)


def test_the_command_prints_json_that_s3_takes_the_size_of() -> None:
    command = [sys.executable, "-m", "infra.iam", "s3://example-models/teams/a/", "--role", "bucket", "--pruner", PRUNER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    document = json.loads(done.stdout)
    assert document == policy(RoleName.BUCKET, "s3://example-models/teams/a", pruner=PRUNER)
    assert len(json.dumps(document)) < 20_480  # bytes of a bucket policy at most; 6,144 of a role's
