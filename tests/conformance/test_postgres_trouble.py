"""What goes wrong one statement at a time: lost answers, locks that others hold, connections that are not there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import psycopg
import pytest
import pytest_asyncio

from penstock.brokers.base import Queue
from penstock.brokers.postgres import PostgresBroker
from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable, ConfigError
from penstock.postgres.address import parse_address
from penstock.postgres.errors import NotBegun
from penstock.postgres.listener import Listener
from penstock.postgres.pool import Pool
from penstock.testing.conformance.harness import Harness, System, ids, message, messages
from tests.helpers import eventually
from tests.servers import postgres_database

Work = Callable[[Any], Awaitable[Any]]


@pytest_asyncio.fixture
async def system(postgres_url: str) -> AsyncIterator[System]:
    system = System(Harness(connect=lambda: PostgresBroker(postgres_url)))
    yield system
    await system.close()


@pytest_asyncio.fixture
async def broker(system: System) -> PostgresBroker:
    broker = await system.connect()
    assert isinstance(broker, PostgresBroker)
    return broker


@pytest_asyncio.fixture
async def own(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of somebody else."""
    connection = await into(postgres_url)
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def other(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Another one."""
    connection = await into(postgres_url)
    yield connection
    await connection.close()


async def into(url: str) -> asyncpg.Connection:
    schema = url.rpartition("=")[2]
    return await asyncpg.connect(postgres_database(), server_settings={"search_path": schema})


@contextlib.contextmanager
def once(monkeypatch: pytest.MonkeyPatch, name: str, before: bool = False) -> Any:
    """The next work of this name ends with an outage: after it was carried out, or `before`. Yields those it hit."""
    run = Pool.run
    hit: list[Work] = []

    async def failing(pool: Pool, work: Work) -> Any:
        if work.__qualname__.endswith(f".<locals>.{name}") and not hit:
            hit.append(work)
            if not before:
                await run(pool, work)
            raise BrokerUnavailable("the line broke")
        return await run(pool, work)

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "run", failing)
        yield hit


async def waiting(own: asyncpg.Connection) -> int:
    """Backends that wait for an advisory lock in this schema's brokers."""
    return int(await own.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))


# -- answers that get lost


async def test_what_a_claim_took_whose_answer_was_lost_is_handed_out(
    broker: PostgresBroker, system: System, own: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = await system.declare(broker, "work")
    subscription = system.consume(broker, queue, lease=30)
    await system.publish(broker, messages("work", 2))
    held = await system.take(subscription, 2)
    sent = await system.publish(broker, messages("work", 3))
    with once(monkeypatch, "claim"), pytest.raises(BrokerUnavailable):
        await subscription.receive(10, 5)
    assert await own.fetchval("SELECT count(owner) FROM messages") == 5
    again = await system.take(subscription, 3)
    assert sorted(ids(again)) == sorted(sent)
    assert [one.redelivered for one in again] == [0] * 3
    assert not any(one.lost for one in held)


async def test_a_claim_that_comes_late_takes_nothing_and_a_late_reclaim_frees_nothing(
    broker: PostgresBroker, system: System, own: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = await system.declare(broker, "work")
    subscription = system.consume(broker, queue, lease=30)
    await system.silent(subscription)
    with once(monkeypatch, "claim", before=True), pytest.raises(BrokerUnavailable):
        await subscription.receive(10, 5)
    with once(monkeypatch, "reclaim", before=True), pytest.raises(BrokerUnavailable):
        await subscription.receive(10, 5)
    await system.silent(subscription)
    await system.publish(broker, messages("work", 1))
    [held] = await system.take(subscription)
    await system.publish(broker, messages("work", 1))
    consumer = await own.fetchval("SELECT id FROM consumers")
    queues = await own.fetchval("SELECT array_agg(id) FROM queues")
    late = await own.fetch("SELECT seq FROM claim($1, 0, $2, '{0}', 10, 1000)", consumer, queues)
    assert [row["seq"] for row in late] == [None]
    assert await own.fetchval("SELECT reclaim($1, '{}', 1)", consumer) is False
    assert await own.fetchval("SELECT owner FROM messages WHERE seq = $1", held.token) == consumer


@pytest.mark.parametrize("name", ["listen", "fetch"])
async def test_an_inbox_comes_back_after_one_statement_that_failed(
    broker: PostgresBroker, own: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    inbox = broker.inbox()
    await inbox.listen(frozenset({"news"}))
    with once(monkeypatch, name, before=True) as hit:
        await own.execute("DELETE FROM inboxes")
        inbox.given_up(inbox.row or 0)
        await eventually(lambda: hit)
        await eventually(lambda: inbox.row)
    with once(monkeypatch, "fetch", before=True) as hit:
        await broker.broadcast(message("news", b"x"))
        [heard] = await inbox.receive(5)
        assert hit
    assert heard.raw == b"x"
    with once(monkeypatch, "fetch", before=True):
        await broker.reply([message(inbox.address, b"y")])
        [reply] = await inbox.receive(5)
    assert reply.raw == b"y"


async def test_a_request_of_which_nobody_knows_whether_it_was_sent_is_not_to_be_sent_again(
    broker: PostgresBroker, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    await system.declare(broker, "work")
    inbox = broker.inbox()
    refused: list[BrokerError] = []
    with once(monkeypatch, "publish"):
        await inbox.request(message("work"), refused.append)
    assert [type(one) for one in refused] == [BrokerUnavailable]

    async def none_left(pool: Pool, work: Work) -> Any:
        raise NotBegun("no connection")

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "run", none_left)
        with pytest.raises(BrokerUnavailable):
            await inbox.request(message("work"), refused.append)
    assert len(refused) == 1


async def test_mail_on_its_way_to_an_inbox_that_closes_does_not_stay(
    broker: PostgresBroker, own: asyncpg.Connection
) -> None:
    inbox, other = broker.inbox(), broker.inbox()
    await inbox.listen(frozenset({"news"}))
    await other.listen(frozenset())
    async with own.transaction():
        address = int(inbox.address.removeprefix("inbox-"), 16)
        await own.execute("SELECT reply($1, '{x}', '{x}')", [address])
        await inbox.close()
    assert await own.fetchval("SELECT count(*) FROM mail") == 1
    broker.heart.start()

    async def gone() -> bool:
        return not await own.fetchval("SELECT count(*) FROM mail")

    await eventually(gone)


# -- locks that others hold


async def test_a_statement_that_was_given_up_is_not_carried_out_later(
    broker: PostgresBroker, system: System, own: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    monkeypatch.setattr("penstock.postgres.pool.WITHIN", 1.0)
    other = PostgresBroker(postgres_url)
    await other.declare(Queue("line", ordered=True))
    async with own.transaction():
        await broker.publish_within([message("line", key="k")], own)
        with pytest.raises(BrokerUnavailable, match="cancelled"):
            await other.publish([message("line", key="k")])
    await other.close()
    assert await own.fetchval("SELECT count(*) FROM messages") == 1


async def test_a_heartbeat_waits_for_no_statement(postgres_url: str, own: asyncpg.Connection) -> None:
    broker = PostgresBroker(f"{postgres_url}&connections=1")
    await broker.declare(Queue("line", ordered=True))
    await broker.declare(Queue("work"))
    lost: list[object] = []
    subscription = broker.subscribe([Queue("work")], prefetch=1, lease=1.0, on_lost=lost.extend)
    await broker.publish([message("work")])
    [held] = await subscription.receive(1, 5)
    async with own.transaction():
        await broker.publish_within([message("line", key="k")], own)
        blocked = asyncio.create_task(broker.publish([message("line", key="k")]))
        first = await own.fetchval("SELECT deadline FROM consumers")

        async def beats() -> bool:
            return bool(await own.fetchval("SELECT deadline > $1 + 1.0 FROM consumers", first))

        await eventually(beats, "the deadline moves", 5)
        assert not blocked.done()
    assert list(await blocked) == [None]
    assert not held.lost
    assert not lost
    await broker.close()


@pytest.mark.parametrize("properties", [{"max_length": 100}, {"ordered": True}])
async def test_claims_wait_for_nobodys_transaction(
    broker: PostgresBroker,
    system: System,
    own: asyncpg.Connection,
    other: asyncpg.Connection,
    properties: dict[str, Any],
) -> None:
    queue = await system.declare(broker, "work", **properties)
    await system.publish(broker, [message("work", key="k", expires_at=time.time() + 1000)])
    sent = await system.publish(broker, messages("work", 5))
    subscription = system.consume(broker, queue, lease=30)
    async with own.transaction():
        await broker.publish_within([message("work", key="k")], own)
        await other.execute("UPDATE messages SET expires = expires - 2000 WHERE expires IS NOT NULL")
        async with asyncio.timeout(5):
            assert ids(await system.take(subscription, 5)) == sent
        assert await own.fetchval("SELECT count(*) FROM messages WHERE expires IS NOT NULL") == 1
    await system.take(subscription, 1)
    assert await own.fetchval("SELECT expired FROM queues") == 1


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_a_transaction_that_does_not_see_others_may_not_publish_what_depends_on_them(
    broker: PostgresBroker, system: System, own: asyncpg.Connection, isolation: Any
) -> None:
    await system.declare(broker, "line", ordered=True)
    await system.declare(broker, "small", max_length=5)
    await system.declare(broker, "work")
    async with own.transaction(isolation=isolation):
        for queue in ("line", "small"):
            with pytest.raises(ValueError, match="READ COMMITTED"):
                await broker.publish_within([message(queue, key="k")], own)
        assert await broker.publish_within([message("work")], own) == [None]
    assert await own.fetchval("SELECT count(*) FROM messages") == 1


async def test_a_psycopg_transaction_that_does_not_see_others_may_not_either(
    broker: PostgresBroker, system: System
) -> None:
    await system.declare(broker, "line", ordered=True)
    async with await psycopg.AsyncConnection.connect(postgres_database()) as connection:
        await connection.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
        with pytest.raises(ValueError, match="READ COMMITTED"):
            await broker.publish_within([message("line", key="k")], connection)


async def test_a_purge_leaves_alone_what_comes_into_lines_it_has_not_locked(
    broker: PostgresBroker, system: System, own: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await system.declare(broker, "line", ordered=True)
    await system.publish(broker, [message("line", key="a")])
    line = await own.fetchval("SELECT line FROM messages")
    prefix = line[:-1]
    another = await own.fetchval(
        "SELECT chr(98 + n) FROM generate_series(0, 20) n WHERE stripe_of($1 || chr(98 + n)) <> stripe_of($2) LIMIT 1",
        *(prefix, line),
    )
    async with own.transaction():
        await broker.publish_within([message("line", key="a")], own)
        assert broker.admin is not None
        purging = asyncio.create_task(broker.admin.purge("line"))
        await eventually(lambda: waiting(other))
        sent = await system.publish(broker, [message("line", key=another)])
    await purging
    page, _ = await broker.admin.browse("line", 10)
    assert ids(page) == sent


# -- what is claimed


async def test_of_thousands_that_expired_together_none_is_handed_out(
    broker: PostgresBroker, system: System, own: asyncpg.Connection
) -> None:
    queue = await system.declare(broker, "work")
    gone = time.time() - 1
    await broker.publish([message("work", expires_at=gone) for _ in range(2500)])
    sent = await system.publish(broker, messages("work", 3))
    subscription = system.consume(broker, queue, prefetch=100)
    assert ids(await system.take(subscription, 3)) == sent
    await subscription.receive(100, 0.5)
    assert await own.fetchval("SELECT expired FROM queues") == 2500


async def test_the_ceiling_of_bytes_is_that_of_a_claim(
    broker: PostgresBroker, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.brokers.postgres.subscription.MOST_BYTES", 1000)
    queues = [await system.declare(broker, name) for name in ("one", "two")]
    for queue in queues:
        await system.publish(broker, [message(queue.name, b"x" * 600) for _ in range(3)])
    subscription = broker.subscribe(queues, prefetch=10, lease=30, on_lost=lambda lost: None)
    assert len(await subscription.receive(10, 5)) == 2


# -- connections


async def test_closing_waits_for_nothing_that_nobody_wants_any_more() -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    broker = PostgresBroker(f"postgresql://a:b@127.0.0.1:{port}/x?timeout=1")

    async def impatient() -> None:
        with contextlib.suppress(TimeoutError, BrokerUnavailable):
            async with asyncio.timeout(0.1):
                await broker.publish([message("work")])

    await asyncio.gather(*[impatient() for _ in range(40)])
    began = time.monotonic()
    await broker.close()
    assert time.monotonic() - began < 4
    server.close()


async def test_what_has_not_begun_is_refused_at_the_end(postgres_url: str, own: asyncpg.Connection) -> None:
    broker = PostgresBroker(f"{postgres_url}&connections=1")
    await broker.declare(Queue("line", ordered=True))
    async with own.transaction():
        await broker.publish_within([message("line", key="k")], own)
        publishing = [asyncio.create_task(broker.publish([message("line", key="k")])) for _ in range(3)]
        await eventually(lambda: waiting(own))
        closing = asyncio.create_task(broker.close())
        for late in publishing[1:]:
            with pytest.raises(NotBegun, match="closed"):
                await late
        assert not closing.done()
    assert list(await publishing[0]) == [None]
    await closing


async def test_who_listens_to_what_another_is_about_to_hear_waits_too(postgres_url: str) -> None:
    listener = Listener(parse_address(postgres_url), lambda: None)
    await listener.listen("penstock-one", lambda payload: None)
    async with listener._using:
        first, second = (asyncio.create_task(listener.listen("penstock-two", lambda payload: None)) for _ in range(2))
        done, _ = await asyncio.wait([first, second], timeout=0.1)
        assert not done
    await asyncio.gather(first, second)
    await listener.close()


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("{}&sslmode=nonsense", "sslmode"),
        ("{}&sslmode=verify-full&sslrootcert=/nope", "no file /nope"),
        ("{}&sslcert=/nope", "no file /nope"),
        ("{}&sslmode=require", "it has no TLS, which sslmode asks for"),
        ("{}&ssl_min_protocol_version=foo", "foo"),
        ("postgresql://a..b/x", "idna"),
        (f"postgresql://{'a' * 70}/x", "idna"),
    ],
)
async def test_an_address_that_the_driver_does_not_take_is_refused_at_once(
    postgres_url: str, url: str, hint: str
) -> None:
    broker = PostgresBroker(url.format(postgres_url))
    with pytest.raises(BrokerError, match=hint) as caught:
        await broker.open()
    assert isinstance(caught.value, BrokerRefused)
    await broker.close()


@pytest.mark.parametrize("part", ["a%00b:x@h/x", "a:%00@h/x", "a:b@h/%00", "h/x?application_name=%00", "h/x?user=%00"])
def test_a_null_character_is_refused_before_anything_is_tried(part: str) -> None:
    with pytest.raises(ConfigError, match="null character"):
        PostgresBroker(f"postgresql://{part}")


async def test_hosts_that_are_not_what_is_asked_for_are_named_in_one_line_and_tried_again(postgres_url: str) -> None:
    broker = PostgresBroker(f"{postgres_url}&target_session_attrs=standby")
    with pytest.raises(BrokerUnavailable) as caught:
        await broker.open()
    assert "no host is standby now, which target_session_attrs asks for" in str(caught.value)
    assert "\n" not in str(caught.value)
    await broker.close()
