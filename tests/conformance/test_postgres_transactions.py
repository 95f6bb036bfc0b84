"""Publishing inside a transaction of the caller's: committed with it, rolled back with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import psycopg
import pytest
import pytest_asyncio

from penstock import (
    App,
    BrokerUnavailable,
    Client,
    Message,
    PublishError,
    QueueFull,
    SyncClient,
    Unroutable,
    Unsupported,
)
from penstock.brokers.base import Queue, Transactional
from penstock.brokers.memory import MemoryBroker
from penstock.brokers.postgres import PostgresBroker
from tests.helpers import eventually


@pytest.fixture
def dsn(postgres_url: str) -> str:
    return postgres_url.partition("?")[0]


@pytest_asyncio.fixture
async def broker(postgres_url: str) -> AsyncIterator[PostgresBroker]:
    broker = PostgresBroker(postgres_url)
    await broker.declare(Queue("work"))
    await broker.declare(Queue("line", ordered=True))
    await broker.declare(Queue("small", max_length=1))
    yield broker
    await broker.close()


@pytest_asyncio.fixture
async def client(postgres_url: str, broker: PostgresBroker) -> AsyncIterator[Client]:
    async with Client(postgres_url) as client:
        yield client


@pytest_asyncio.fixture
async def own(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """The caller's connection."""
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


async def there(broker: PostgresBroker, queue: str = "work") -> int:
    [info] = await broker.admin.inspect([queue])
    return info.ready or 0


async def test_of_a_thousand_rolled_back_none_is_published_and_of_a_thousand_committed_all(
    client: Client, broker: PostgresBroker, own: asyncpg.Connection
) -> None:
    for number in range(2000):
        transaction = own.transaction()
        await transaction.start()
        await client.publish("work", number, transaction=own)
        await (transaction.rollback if number % 2 else transaction.commit)()
    assert await there(broker) == 1000
    page, _ = await broker.admin.browse("work", 2000)
    assert [int(one.raw) for one in page] == list(range(0, 2000, 2))


async def test_nobody_sees_it_before_the_commit_and_who_waits_hears_of_it_then(
    postgres_url: str, own: asyncpg.Connection
) -> None:
    app, seen = App(postgres_url), []

    @app.route("work")
    async def work(message: Message) -> None:
        seen.append(message.id)

    async with app:
        async with own.transaction():
            id = await app.publish("work", "x", transaction=own)
            await asyncio.sleep(0.2)
            assert seen == []
        await eventually(lambda: seen == [id], within=3)


async def test_with_the_callers_own_rows(client: Client, broker: PostgresBroker, own: asyncpg.Connection) -> None:
    await own.execute("CREATE TEMPORARY TABLE orders (id int PRIMARY KEY)")
    for number in (1, 2, 1):
        try:
            async with own.transaction():
                ids = await client.publish_many("work", [number] * 3, transaction=own)
                await client.publish("line", number, key="k", transaction=own)
                await own.execute("INSERT INTO orders VALUES ($1)", number)
                assert len(set(ids)) == 3
        except asyncpg.UniqueViolationError:
            pass
    assert (await there(broker), await there(broker, "line")) == (6, 2)


async def test_with_psycopg(client: Client, broker: PostgresBroker, dsn: str) -> None:
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        await client.publish("work", {"a": 1}, headers={"h": 1}, priority=3, delay=0.0, transaction=connection)
        assert await there(broker) == 0
        await connection.commit()
        await client.publish("work", b"\x00\xff", expires=60, transaction=connection)
        await connection.rollback()
        await connection.set_autocommit(True)
        with pytest.raises(ValueError, match="begin one"):
            await client.publish("work", "x", transaction=connection)
        async with connection.transaction():
            await client.publish("work", b"\x00\xff", expires=60, transaction=connection)
    page, _ = await broker.admin.browse("work", 10)
    assert sorted(one.raw for one in page) == [b"\x00\xff", b'{"a":1}']


@pytest.mark.blocks
def test_from_blocking_code_with_psycopg(postgres_url: str, dsn: str) -> None:
    async def declare() -> None:
        broker = PostgresBroker(postgres_url)
        await broker.declare(Queue("work"))
        await broker.close()

    async def count() -> int:
        broker = PostgresBroker(postgres_url)
        try:
            return await there(broker)
        finally:
            await broker.close()

    asyncio.run(declare())
    with SyncClient(postgres_url) as client, psycopg.connect(dsn) as connection:
        client.publish("work", "kept", transaction=connection)
        connection.commit()
        client.publish("work", "dropped", transaction=connection)
        connection.rollback()
    assert asyncio.run(count()) == 1


async def test_a_refusal_leaves_the_transaction_usable(
    client: Client, broker: PostgresBroker, own: asyncpg.Connection
) -> None:
    async with own.transaction():
        with pytest.raises(Unroutable):
            await client.publish("nowhere", "x", transaction=own)
        await client.publish("small", "x", transaction=own)
        with pytest.raises(QueueFull):
            await client.publish("small", "x", transaction=own)
        await client.publish("work", "x", transaction=own)
    assert (await there(broker), await there(broker, "small")) == (1, 1)


async def trouble(client: Client, transaction: Any) -> str:
    """The line of an error that does not heal by itself."""
    with pytest.raises(PublishError) as caught:
        await client.publish("work", "x", transaction=transaction)
    assert not isinstance(caught.value, BrokerUnavailable)
    return str(caught.value)


async def test_what_cannot_heal_in_a_transaction_is_no_outage(
    client: Client, broker: PostgresBroker, own: asyncpg.Connection, dsn: str
) -> None:
    await client.connect()
    aborted = own.transaction()
    await aborted.start()
    with pytest.raises(asyncpg.DivisionByZeroError):
        await own.execute("SELECT 1/0")
    assert "a statement in it has failed: roll it back" in await trouble(client, own)
    await aborted.rollback()
    async with own.transaction(readonly=True):
        assert "it is READ ONLY" in await trouble(client, own)
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await connection.execute("SELECT 1/0")
        assert "a statement in it has failed: roll it back" in await trouble(client, connection)
        await connection.rollback()
        await connection.set_read_only(True)
        assert "it is READ ONLY" in await trouble(client, connection)
        await connection.rollback()
    elsewhere = await asyncpg.connect(dsn.rpartition("/")[0] + "/postgres")
    async with elsewhere.transaction():
        assert "its database is not the broker's: schema 't" in await trouble(client, elsewhere)
    await elsewhere.close()
    assert await there(broker) == 0


async def test_what_is_no_transaction_is_refused(client: Client, own: asyncpg.Connection) -> None:
    with pytest.raises(ValueError, match="begin one"):
        await client.publish("work", "x", transaction=own)
    for wrong in ("a connection", object(), client):
        with pytest.raises(TypeError, match="asyncpg or psycopg"):
            await client.publish("work", "x", transaction=wrong)


async def test_other_systems_say_that_they_cannot(own: asyncpg.Connection) -> None:
    async with Client("memory://transactions") as client:
        with pytest.raises(Unsupported, match="postgresql"):
            await client.publish("work", "x", transaction=own)


def test_the_capability_says_which_brokers_are_transactional() -> None:
    assert PostgresBroker.capabilities.transactions
    assert isinstance(PostgresBroker("postgresql://h/d"), Transactional)
    memory = MemoryBroker("memory://x")
    assert not memory.capabilities.transactions
    assert not isinstance(memory, Transactional)
