"""What all tests share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from penstock import App
from penstock.brokers.base import Queue
from tests.servers import delete_queues, rabbitmq_vhost


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in a directory of its own, untouched by the environment it was started in."""
    for name in list(os.environ):
        if name.startswith("PENSTOCK_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    """A blocking call in an event loop fails the test, unless it is about that: `@pytest.mark.blocks`."""
    if request.node.get_closest_marker("blocks"):
        yield None
        return
    with blockbuster_ctx("penstock") as detector:
        # Locks here are held for the length of a dictionary update.
        detector.functions["threading.Lock.acquire"].deactivate()
        # Declaring an app looks for penstock.toml; that is before anything runs.
        for name in ("os.stat", "os.path.abspath", "os.readlink", "io.BufferedReader.read", "io.TextIOWrapper.read"):
            if name in detector.functions:
                detector.functions[name].can_block_in("penstock/config.py", {"find_file", "_read", "default_broker"})
                detector.functions[name].can_block_in("penstock/brokers/sqlite/file.py", {"lease"})
        yield detector


@pytest.fixture(scope="session")
def amqp_vhost() -> Iterator[str]:
    """The URL of a namespace of RabbitMQ for this run of the tests."""
    with rabbitmq_vhost() as url:
        yield url


@pytest.fixture
def amqp_url(amqp_vhost: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same, with nothing in it: what a test declares in this process is deleted when it ends."""
    from penstock.brokers.amqp import AmqpBroker

    declared: set[str] = set()
    declare = AmqpBroker.declare

    async def remember(broker: AmqpBroker, queue: Queue) -> None:
        await declare(broker, queue)
        declared.add(queue.name)

    monkeypatch.setattr(AmqpBroker, "declare", remember)
    yield amqp_vhost
    asyncio.run(delete_queues(amqp_vhost, declared))


@pytest.fixture(params=["memory", "sqlite", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh message system of each kind."""
    if request.param == "memory":
        return f"memory://{tmp_path.name}-{os.getpid()}-{id(request)}"
    if request.param == "rabbitmq":
        return f"{request.getfixturevalue('amqp_url')}?heartbeat=1"
    return f"sqlite:///{tmp_path / 'queue.db'}"


@pytest.fixture
def other_vhost(broker_url: str) -> Iterator[str]:
    """Another namespace of that system."""
    if not broker_url.startswith("amqp:"):
        yield "fluentd"
        return
    with rabbitmq_vhost("-other") as url:
        yield url.rpartition("/")[2] or "/"


@pytest.fixture
def make_app(broker_url: str) -> Callable[..., App]:
    """Apps on that system, impatient ones."""

    def make(**options: Any) -> App:
        return App(broker_url, **{"lease": 1.0, "grace": 5.0, **options})

    return make
