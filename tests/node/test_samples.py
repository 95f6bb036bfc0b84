"""The documents' own YAML, unmodified: what it defines, and that it runs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from penstock import App
from penstock.node.debug import CHANNEL
from penstock.node.folder import Folder
from penstock.node.node import Node, NodeOptions
from tests.examples.outside import kafka
from tests.helpers import eventually

DOCUMENTS = Path(__file__).parent / "documents"


def test_they_load_as_what_they_are() -> None:
    found = Folder(DOCUMENTS).read()
    workers = {name: (one.mode, one.category, one.function, one.watch_interval) for name, one in found.workers.items()}
    assert workers == {
        "consumer": ("multi", "example", "consume", None),
        "producer": ("single", "example", "produce", None),
        "SQSConsumer": ("single", "example", "consume", None),
        "CloudPubSubConsumer": ("single", "example", "consume", None),
    }
    jobs = {name: (one.topics, one.category, one.slack) for name, one in found.jobs.items()}
    assert jobs == {"example": (("hello", "world"), None, None)}
    assert {name: one.category for name, one in found.functions.items()} == {
        "SQSProducer": "example",
        "CloudPubSubPublisher": "example",
    }
    assert not found.configs


@contextlib.asynccontextmanager
async def hosting(folder: Path) -> AsyncIterator[tuple[Node, list[str]]]:
    """A node, and what its scripts show."""
    app = App(f"sqlite:///{folder.parent / 'node.db'}", lease=2, grace=1)
    shown: list[str] = []
    async with Node(folder, app, NodeOptions(worker_watch_interval=0.2)) as node:
        await app.client.subscribe(CHANNEL, lambda said: shown.append(said["text"]))
        yield node, shown


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "definitions"
    made.mkdir()
    return made


async def test_the_job_says_hello_and_bye(folder: Path) -> None:
    shutil.copy(DOCUMENTS / "job_example.yml", folder)
    async with hosting(folder) as (node, shown):
        await node.send("hello", {"name": "amuro"})
        await eventually(lambda: shown == ["Hello, amuro"])
        await node.send("world", {"name": "amuro"})
        await eventually(lambda: shown == ["Hello, amuro", "Bye, amuro"])


@pytest.mark.blocks  # a driver is imported by a script, in the loop
@pytest.mark.filterwarnings("ignore:The .*loop.* deprecated:DeprecationWarning")
async def test_what_the_producer_sends_to_kafka_the_consumer_shows(folder: Path) -> None:
    with kafka() as servers:
        for name in ("kafka_producer.yml", "kafka_consumer.yml"):
            text = (DOCUMENTS / name).read_text()
            assert text.count("localhost:29092") == 1
            (folder / name).write_text(text.replace("localhost:29092", servers))
        async with hosting(folder) as (node, shown):
            heard = await eventually(lambda: next((one for one in shown if "Hello, kafka!!" in one), None))
            assert heard.startswith("topic='my_topic' partition=")
            assert "value=b'Hello, kafka!!'" in heard
            workers = {one.name: one.nodes[0] for one in await node.cluster.workers()}
            assert workers["consumer"].state == "running"
            assert {one.last_error for one in workers.values()} == {None}


@pytest.mark.blocks
async def test_a_sample_that_its_library_has_left_behind_fails_alone_and_says_why(folder: Path) -> None:
    for name in ("sqs_consumer.yml", "pubsub_consumer.yml", "job_example.yml"):
        shutil.copy(DOCUMENTS / name, folder)
    (folder / "configs").mkdir()
    (folder / "configs" / "handson.yml").write_text("gcp_project_id: p\n")

    async with hosting(folder) as (node, shown):

        async def errors() -> dict[str, Any] | None:
            found = {one.name: one.nodes[0].last_error for one in await node.cluster.workers()}
            return found if len(found) == 2 and None not in found.values() else None

        found = await eventually(errors)
        assert "AttributeError: module 'aiobotocore' has no attribute 'get_session'" in found["SQSConsumer"]
        assert "ModuleNotFoundError: No module named 'gcloud.aio.pubsub.metrics_agent'" in found["CloudPubSubConsumer"]
        await node.send("hello", {"name": "amuro"})
        await eventually(lambda: shown == ["Hello, amuro"])
