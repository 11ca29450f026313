"""The function behind a queue: golden events in, real S3, SQS, EventBridge and DynamoDB calls out (to a moto server)."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from onnx import helper

from tests.handlers.starting import Handler, Invocation, golden_event, metrics, start
from triform import testing
from triform.errors import ConfigurationError, InvalidRequest


def hanging(path: Path) -> Path:
    """y = x: x INT64[rows] -> y INT64[rows], by a Loop that would turn for years where an x is 100."""
    body = helper.make_graph(
        [helper.make_node("Add", ["h", "zero"], ["h2"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [testing.value("i", "INT64", []), testing.value("go", "BOOL", []), testing.value("h", "INT64", ["N"])],
        [testing.value("on", "BOOL", []), testing.value("h2", "INT64", ["N"])],
    )
    nodes = [
        helper.make_node("Gather", ["turns", "x"], ["each"]),
        helper.make_node("ReduceMax", ["each"], ["most"], keepdims=0),
        helper.make_node("Loop", ["most", "begin", "x"], ["y"], body=body),
    ]
    constants = {"turns": np.array([0] * 100 + [2**60]), "begin": np.array(True), "zero": np.zeros(1, np.int64)}
    return testing.save(path, nodes, [testing.value("x", "INT64", ["N"])], [testing.value("y", "INT64", ["N"])], constants)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lookup` (an x beyond 9 fails the whole run), `linear`, and `hanging` (an x of 100 never ends)."""
    root = tmp_path_factory.mktemp("sqs")
    made = {"lookup": testing.lookup(root / "lookup.onnx"), "linear": testing.linear(root / "linear.onnx")}
    made["hanging"] = hanging(root / "hanging.onnx")
    testing.repository(root / "models", made)
    return root / "models"


@pytest.fixture
def serve(models: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Handler]:
    def make(**settings: object) -> Handler:
        given = {"repository": models, "results": f"s3://{s3_bucket}/out", **settings}
        return start("sqs", monkeypatch, **given)

    return make


@pytest.fixture
def table(s3_bucket: str) -> str:
    boto3.client("dynamodb").create_table(
        TableName=s3_bucket,
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    return s3_bucket


def event(*bodies: Any, kind: str = "sqs") -> dict[str, Any]:
    """The golden event with a record for each body (text as it is, other values as JSON)."""
    golden = golden_event(kind)
    (record,) = golden["Records"]
    golden["Records"] = [
        {**record, "messageId": str(uuid.uuid4()), "body": body if isinstance(body, str) else json.dumps(body)} for body in bodies
    ]
    return golden  # type: ignore[no-any-return]


def ids(event: dict[str, Any]) -> list[str]:
    return [record["messageId"] for record in event["Records"]]


def failed(answer: dict[str, Any]) -> list[str]:
    assert answer.keys() == {"batchItemFailures"}
    return [item["itemIdentifier"] for item in answer["batchItemFailures"]]


def results(bucket: str) -> dict[str, Any]:
    """What lies below out/, by message id."""
    client = boto3.client("s3")
    found = client.list_objects_v2(Bucket=bucket, Prefix="out/").get("Contents", [])
    return {
        f["Key"].removeprefix("out/").removesuffix(".json"): json.loads(
            client.get_object(Bucket=bucket, Key=f["Key"])["Body"].read()
        )
        for f in found
    }


def x(*values: int) -> dict[str, Any]:
    return {"model": "lookup", "instances": list(values)}


def test_the_golden_message_is_answered(serve: Callable[..., Handler], s3_bucket: str) -> None:
    golden = golden_event("sqs")
    assert failed(serve()(golden, Invocation())) == []
    (message,) = ids(golden)
    assert results(s3_bucket) == {message: {"message_id": message, "model": "lookup/1", "predictions": [10.0, 20.0]}}


def test_the_rows_of_several_messages_are_one_run(
    serve: Callable[..., Handler], s3_bucket: str, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = serve()
    sent = event(x(1), x(2, 3), {"model": "linear", "instances": [[1, 1, 1]]}, x(4))
    assert failed(handler(sent, Invocation())) == []
    assert [results(s3_bucket)[message]["predictions"] for message in ids(sent)] == [[10.0], [20.0, 30.0], [[6.0]], [40.0]]
    printed = capfd.readouterr().out
    runs = {line["model"]: line["triform_batch_rows"] for line in metrics(printed, "triform_batch_rows")}
    assert runs == {"lookup": [4.0], "linear": [1.0]}
    counted = {line["model"]: line["triform_requests_total"] for line in metrics(printed, "triform_requests_total")}
    assert counted == {"lookup": [1.0, 1.0, 1.0], "linear": [1.0]}


POISON = [
    "", "[", "7", "null", "[]", "\ud800", "{}", '{"model": "lookup"}', '{"model": "lookup", "model": "lookup", "instances": [1]}',
    {"model": "nobody", "instances": [1]}, {"model": "../x", "instances": [1]}, {"model": 7, "instances": [1]},
    {"model": "lookup", "instances": ["a"]}, {"model": "lookup", "instances": [1.5]}, {"model": "lookup", "instances": [2**63]},
    {"model": "lookup", "instances": [1], "inputs": [1]}, {"model": "lookup", "version": 9, "instances": [1]},
    {"model": "lookup", "version": 1, "alias": "stable", "instances": [1]}, {"model": "lookup", "instances": [99]},
    {"model": "lookup", "instances": [1], "output": "s3://elsewhere/x"}, '{"model": "lookup", "instances": [NaN]}',
    '{"model": "lookup", "instances": ' + "[" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("poison", POISON, ids=[str(i) for i in range(len(POISON))])
def test_one_poison_message_of_ten_fails_alone(
    poison: Any, serve: Callable[..., Handler], s3_bucket: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sent = event(*[x(i) for i in range(6)], poison, *[x(i) for i in range(3)])
    assert failed(serve()(sent, Invocation())) == [ids(sent)[6]]
    good = ids(sent)[:6] + ids(sent)[7:]
    assert [results(s3_bucket)[message]["predictions"] for message in good] == [[10.0 * i] for i in [*range(6), *range(3)]]
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err


def heavy(*values: int) -> dict[str, Any]:
    return {"model": "hanging", "instances": list(values)}


def test_a_message_that_takes_too_long_fails_alone(serve: Callable[..., Handler], s3_bucket: str) -> None:
    handler = serve()
    sent = event(heavy(100), heavy(1), heavy(2, 3), x(4), heavy(5))
    assert failed(handler(sent, Invocation(seconds=4))) == ids(sent)[:1]
    answers = results(s3_bucket)
    assert [answers[message]["predictions"] for message in ids(sent)[1:]] == [[1], [2, 3], [40.0], [5]]
    again = {"Records": [{**sent["Records"][0], "body": json.dumps(heavy(6))}]}
    assert failed(handler(again, Invocation())) == []


def test_of_a_fifo_queue_what_stands_before_it_is_answered(serve: Callable[..., Handler], s3_bucket: str) -> None:
    handler = serve()
    sent = event(heavy(1), heavy(2), heavy(100), heavy(3), kind="sqs-fifo")
    assert failed(handler(sent, Invocation(seconds=4))) == ids(sent)[2:]
    assert sorted(results(s3_bucket)) == sorted(ids(sent)[:2])


def test_rows_that_cannot_be_stacked_are_run_message_by_message(
    serve: Callable[..., Handler], s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = serve()

    def short_of_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "concatenate", short_of_memory)
    sent = event(x(1), x(2), x(99))
    assert failed(handler(sent, Invocation())) == ids(sent)[2:]
    assert sorted(results(s3_bucket)) == sorted(ids(sent)[:2])


def test_of_a_fifo_queue_nothing_is_answered_after_the_first_failure(
    serve: Callable[..., Handler], s3_bucket: str, table: str
) -> None:
    handler = serve(idempotency_table=table)
    sent = event(x(1), x(99), x(3), x(99), kind="sqs-fifo")
    assert failed(handler(sent, Invocation())) == ids(sent)[1:]
    assert list(results(s3_bucket)) == ids(sent)[:1]
    mended = {"Records": [{**sent["Records"][i], "body": json.dumps(x(i))} for i in range(1, 4)]}
    assert failed(handler(mended, Invocation())) == []
    assert sorted(results(s3_bucket)) == sorted(ids(sent))


@pytest.mark.parametrize("idempotent", [False, True])
def test_the_same_message_twice_also_at_once_has_one_result(
    idempotent: bool, serve: Callable[..., Handler], s3_bucket: str, table: str
) -> None:
    boto3.client("s3").put_bucket_versioning(Bucket=s3_bucket, VersioningConfiguration={"Status": "Enabled"})
    handler = serve(**({"idempotency_table": table} if idempotent else {}))
    sent = event(x(1), x(2))
    sent["Records"] += sent["Records"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: failed(handler(sent, Invocation())), range(4)))
    for message in set(ids(sent)):  # some of the calls may find that another is at it
        assert any(message not in answer for answer in answers)
    assert failed(handler(sent, Invocation())) == []
    versions = boto3.client("s3").list_object_versions(Bucket=s3_bucket, Prefix="out/")["Versions"]
    assert sorted(v["Key"] for v in versions) == sorted(f"out/{message}.json" for message in set(ids(sent)))


def test_a_message_that_is_being_answered_elsewhere_comes_again(
    serve: Callable[..., Handler], s3_bucket: str, table: str
) -> None:
    from handlers._idempotency import TableClaims

    sent, elsewhere = event(x(1), x(2)), TableClaims(table, 60)
    assert elsewhere.claim(ids(sent)[0], Invocation())
    handler = serve(idempotency_table=table)
    assert failed(handler(sent, Invocation())) == ids(sent)[:1]
    elsewhere.give_back(ids(sent)[0])
    assert failed(handler(sent, Invocation())) == []
    assert sorted(results(s3_bucket)) == sorted(ids(sent))


def test_who_dies_over_a_message_leaves_it_to_the_next(serve: Callable[..., Handler], s3_bucket: str, table: str) -> None:
    from handlers._idempotency import TableClaims

    sent = event(x(1))
    assert TableClaims(table, 60).claim(ids(sent)[0], Invocation(seconds=-1.0))  # its time is up, and it said nothing more
    assert failed(serve(idempotency_table=table)(sent, Invocation())) == []
    assert list(results(s3_bucket)) == ids(sent)


@pytest.mark.parametrize("fifo", [False, True])
def test_answers_to_a_queue(fifo: bool, serve: Callable[..., Handler], s3_bucket: str, table: str) -> None:
    client = boto3.client("sqs")
    attributes = {"FifoQueue": "true"} if fifo else {}
    url = client.create_queue(QueueName=f"{s3_bucket}{'.fifo' if fifo else ''}", Attributes=attributes)["QueueUrl"]
    handler = serve(results=url, idempotency_table=table)
    sent = event(x(1), x(2), kind="sqs-fifo" if fifo else "sqs")
    assert failed(handler(sent, Invocation())) == []
    assert failed(handler(sent, Invocation())) == []  # answered before
    received = client.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]
    answers = {body["message_id"]: body["predictions"] for body in (json.loads(m["Body"]) for m in received)}
    assert answers == dict(zip(ids(sent), [[10.0], [20.0]], strict=True))
    assert len(received) == 2


def test_answers_to_an_event_bus(serve: Callable[..., Handler], s3_bucket: str) -> None:
    events, sqs = boto3.client("events"), boto3.client("sqs")
    bus = f"bus-{s3_bucket[-12:]}"
    events.create_event_bus(Name=bus)
    url = sqs.create_queue(QueueName=bus)["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    events.put_rule(Name=bus, EventBusName=bus, EventPattern=json.dumps({"detail-type": ["triform.answer"]}))
    events.put_targets(Rule=bus, EventBusName=bus, Targets=[{"Id": "1", "Arn": arn}])
    sent = event(x(3))
    assert failed(serve(results=f"events:{bus}")(sent, Invocation())) == []
    (received,) = sqs.receive_message(QueueUrl=url)["Messages"]
    detail = json.loads(received["Body"])["detail"]
    assert detail == {"message_id": ids(sent)[0], "model": "lookup/1", "predictions": [30.0]}


def test_an_answer_that_no_message_takes_fails_and_is_never_cut(serve: Callable[..., Handler], s3_bucket: str) -> None:
    client = boto3.client("sqs")
    url = client.create_queue(QueueName=s3_bucket)["QueueUrl"]
    sent = event(x(*[9] * 60_000), x(1))
    assert failed(serve(results=url)(sent, Invocation())) == ids(sent)[:1]
    assert len(client.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]) == 1
    assert failed(serve(results="events:default")(sent, Invocation())) == ids(sent)[:1]


def test_results_that_cannot_be_delivered_come_again(serve: Callable[..., Handler], table: str, s3_bucket: str) -> None:
    handler = serve(results="s3://no-such-bucket-of-ours/out", idempotency_table=table)
    sent = event(x(1), x(2))
    assert failed(handler(sent, Invocation())) == ids(sent)
    assert failed(serve(idempotency_table=table)(sent, Invocation())) == []  # the claims were given back


def test_without_time_nothing_is_answered(serve: Callable[..., Handler], s3_bucket: str) -> None:
    sent = event(x(1), x(2))
    assert failed(serve()(sent, Invocation(seconds=0.1))) == ids(sent)
    assert results(s3_bucket) == {}


@pytest.mark.parametrize("message", ["../../x", "", "a\nb", "\ud800"])
def test_an_id_that_leads_elsewhere_is_refused(message: str, serve: Callable[..., Handler], s3_bucket: str) -> None:
    sent = event(x(1))
    sent["Records"][0]["messageId"] = message
    assert failed(serve()(sent, Invocation())) == [message]
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=s3_bucket)


@pytest.mark.parametrize(
    "event", [None, {}, [], {"Records": [{}]}, {"Records": None}, {"Records": [{"messageId": "a", "body": None}]}]
)
def test_what_is_no_event_of_a_queue_is_refused(event: Any, serve: Callable[..., Handler]) -> None:
    with pytest.raises(InvalidRequest):
        serve()(event, Invocation())


@pytest.mark.parametrize("results", ["events:", "ftp://x", "s3://B"])
def test_a_start_without_a_place_for_results_is_refused(results: str, serve: Callable[..., Handler]) -> None:
    with pytest.raises(ConfigurationError):
        serve(results=results)


def test_a_start_that_names_no_results_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="TRIFORM_RESULTS"):
        start("sqs", monkeypatch, repository=models)
