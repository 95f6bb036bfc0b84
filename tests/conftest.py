"""What all tests share."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from penstock import App
from penstock.brokers.base import Queue
from tests.servers import delete_queues, nats_space, postgres_schemas, rabbitmq_vhost, redis_namespace

_spaces = itertools.count(1)


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
        reading = ("io.BufferedReader.read", "io.TextIOWrapper.read")
        for name in ("os.stat", "os.getcwd", "os.path.abspath", "os.readlink", *reading):
            if name in detector.functions:
                detector.functions[name].can_block_in("penstock/config.py", {"find_file", "_read", "default_broker"})
                detector.functions[name].can_block_in("penstock/sqlite/file.py", {"lease"})
                detector.functions[name].can_block_in("penstock/tasks/instants.py", {"_zone"})
                detector.functions[name].can_block_in("penstock/postgres/pool.py", {"connect"})  # keys, passwords
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


@pytest.fixture
def redis_url() -> Iterator[str]:
    """The URL of a namespace of Redis, with nothing in it."""
    with redis_namespace() as url:
        yield url


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """The URL of a schema that is not there yet."""
    with postgres_schemas() as url:
        yield url


@pytest.fixture
def nats_url() -> Iterator[str]:
    """The URL of a space of NATS with nothing in it."""
    with nats_space(f"test-{os.getpid()}-{next(_spaces)}") as url:
        yield url


@pytest.fixture(params=["memory", "sqlite", "postgres", "rabbitmq", "redis", "nats"])
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh message system of each kind."""
    return fresh_url(request, tmp_path)


def fresh_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh message system of the kind that is asked for."""
    if request.param == "memory":
        return f"memory://{tmp_path.name}-{os.getpid()}-{id(request)}"
    if request.param == "nats":
        return str(request.getfixturevalue("nats_url"))
    if request.param == "rabbitmq":
        return f"{request.getfixturevalue('amqp_url')}?heartbeat=1"
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path / 'queue.db'}"


@pytest.fixture
def other_vhost(broker_url: str) -> Iterator[str]:
    """Another namespace of that system."""
    if broker_url.startswith("redis:"):
        with redis_namespace() as url:
            yield url.rpartition("=")[2]
        return
    if broker_url.startswith("postgresql:"):
        yield broker_url.rpartition("schema=")[2] + "_other"
        return
    if broker_url.startswith("nats:"):
        with nats_space(f"other-{os.getpid()}-{next(_spaces)}") as url:
            yield url.rpartition("/")[2]
        return
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
