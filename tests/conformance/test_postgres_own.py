"""What is PostgreSQL's own: addresses, rights, its schema, and what must not get slower."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from penstock.brokers import registry
from penstock.brokers.base import Ack, Broker, Move, Queue
from penstock.brokers.postgres import PostgresBroker
from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable, ConfigError, StorageFull, Unroutable
from penstock.postgres.address import parse_address
from penstock.postgres.pool import Pool
from penstock.stores import registry as stores
from penstock.stores.base import Put
from penstock.stores.postgres import PostgresStore
from penstock.testing.conformance.harness import Harness, System, acks, ids, message, messages
from tests.helpers import eventually
from tests.servers import postgres_database

_numbers = itertools.count(1)


@pytest_asyncio.fixture
async def system(postgres_url: str) -> AsyncIterator[System]:
    system = System(Harness(connect=lambda: PostgresBroker(postgres_url)))
    yield system
    await system.close()


@pytest_asyncio.fixture
async def broker(system: System) -> Broker:
    return await system.connect()


@pytest_asyncio.fixture
async def database() -> AsyncIterator[asyncpg.Connection]:
    """A connection of an operator."""
    connection = await asyncpg.connect(postgres_database())
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def stranger(database: asyncpg.Connection) -> AsyncIterator[str]:
    """A role that may connect and nothing else; its name and password."""
    name = f"penstock_stranger_{next(_numbers)}"
    await database.execute(f"DROP ROLE IF EXISTS {name}")
    await database.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{name}'; GRANT {name} TO CURRENT_USER")
    yield name
    await database.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def as_role(url: str, role: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{role}:{role}@{rest.partition('@')[2]}"


async def refusal(url: str, kind: type[Exception] = BrokerRefused) -> str:
    """The one line that opening ends with."""
    broker = PostgresBroker(url)
    with pytest.raises(kind) as caught:
        await broker.open()
    await broker.close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- addresses


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("postgresql://h/db?shema=x", "schema"),
        ("postgresql://h/db?connections=0", "connections"),
        ("postgresql://h/db?connections=many", "connections"),
        ("postgresql://h/db?timeout=0", "timeout"),
        ("postgresql://h/db?schema=pg_mine", "pg_mine"),
        (f"postgresql://h/db?schema={'x' * 60}", "48 bytes"),
    ],
)
def test_an_address_that_can_never_work_says_why(url: str, hint: str) -> None:
    for connect in (registry.connect, stores.connect):
        with pytest.raises(ConfigError, match=hint):
            connect(url)


def test_both_schemes_are_served_and_a_vhost_is_a_schema() -> None:
    assert PostgresBroker("postgres://h/db").address.schema == "penstock"
    assert PostgresBroker("postgresql://h/db?schema=one").address.schema == "one"
    assert PostgresBroker("postgresql://h/db?schema=one", vhost="two").address.schema == "two"
    assert stores.serves("postgres://h/db")


async def test_any_name_can_be_a_schema(postgres_url: str) -> None:
    broker = PostgresBroker(postgres_url + "%20a%22b'%25c;%C3%A9")
    await broker.declare(Queue("work"))
    assert list(await broker.publish(messages("work", 1))) == [None]
    subscription = broker.subscribe([Queue("work")], prefetch=1, lease=5, on_lost=lambda lost: None)
    assert len(await subscription.receive(1, 5)) == 1
    await broker.close()


# -- what the server says


async def test_a_wrong_user_a_wrong_database_and_no_server(postgres_url: str) -> None:
    assert "nobody_here" in await refusal(as_role(postgres_url, "nobody_here"))
    assert "no such database" in await refusal(postgres_url.replace("/penstock?", "/nowhere?"))
    said = await refusal("postgresql://penstock:secret@127.0.0.1:1/penstock", BrokerUnavailable)
    assert "secret" not in said
    assert "cannot reach" in said


async def test_without_rights_it_says_which(postgres_url: str, stranger: str, database: asyncpg.Connection) -> None:
    url = as_role(postgres_url, stranger)
    assert "GRANT CREATE ON DATABASE" in await refusal(url)
    owner = PostgresBroker(postgres_url)
    await owner.open()
    await owner.declare(Queue("work"))
    assert "GRANT USAGE ON SCHEMA" in await refusal(url)
    schema = postgres_url.rpartition("=")[2]
    await database.execute(
        f"GRANT USAGE ON SCHEMA {schema} TO {stranger}; GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {stranger};"
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA {schema} TO {stranger}"
    )
    modest = PostgresBroker(url)
    await modest.open()
    assert list(await modest.publish(messages("work", 1))) == [None]
    await modest.close()
    await owner.close()


async def test_a_limit_of_connections_is_waited_for(
    postgres_url: str, stranger: str, database: asyncpg.Connection
) -> None:
    await database.execute(f"ALTER ROLE {stranger} CONNECTION LIMIT 1")
    url = as_role(postgres_url, stranger)
    taken = await asyncpg.connect(url.partition("?")[0])
    assert "max_connections" in await refusal(url, BrokerUnavailable)
    await taken.close()


async def test_at_the_limit_of_connections_work_waits_for_those_it_has(
    postgres_url: str, stranger: str, database: asyncpg.Connection
) -> None:
    await database.execute(f"GRANT CREATE ON DATABASE penstock TO {stranger}; ALTER ROLE {stranger} CONNECTION LIMIT 2")
    broker = PostgresBroker(as_role(postgres_url, stranger))
    await broker.declare(Queue("work"))
    taken = await asyncpg.connect(as_role(postgres_url, stranger).partition("?")[0])
    outcomes = await asyncio.gather(*(broker.publish(messages("work", 1)) for _ in range(12)))
    assert [list(one) for one in outcomes] == [[None]] * 12
    await taken.close()
    await broker.close()
    await database.execute(f"REVOKE CREATE ON DATABASE penstock FROM {stranger}")


async def test_a_heartbeat_that_gets_no_connection_of_its_own_takes_another(
    postgres_url: str, stranger: str, database: asyncpg.Connection
) -> None:
    await database.execute(f"GRANT CREATE ON DATABASE penstock TO {stranger}; ALTER ROLE {stranger} CONNECTION LIMIT 2")
    broker = PostgresBroker(as_role(postgres_url, stranger))
    await broker.declare(Queue("work"))
    subscription = broker.subscribe([Queue("work")], prefetch=1, lease=0.6, on_lost=lambda lost: None)
    await subscription.receive(1, 0.1)
    schema = postgres_url.rpartition("=")[2]
    joined = f"SELECT deadline FROM {schema}.consumers"
    first = await database.fetchval(joined)

    async def beats() -> bool:
        return bool(await database.fetchval(joined) > first)

    await eventually(beats)
    await broker.close()
    await database.execute(f"REVOKE CREATE ON DATABASE penstock FROM {stranger}")


async def test_a_full_disk_refuses_messages_and_keeps_those_it_has(
    broker: Broker, system: System, postgres_url: str, database: asyncpg.Connection
) -> None:
    queue = await system.declare(broker, "work")
    sent = await system.publish(broker, messages("work", 2))
    schema = postgres_url.rpartition("=")[2]
    await database.execute(f"""
        CREATE FUNCTION {schema}.full() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN RAISE SQLSTATE '53100' USING MESSAGE = 'could not extend file: No space left'; END$$;
        CREATE TRIGGER full_disk BEFORE INSERT ON {schema}.messages EXECUTE FUNCTION {schema}.full()""")
    assert [type(one) for one in await broker.publish(messages("work", 3))] == [StorageFull] * 3
    await database.execute(f"DROP TRIGGER full_disk ON {schema}.messages")
    assert sorted(ids(await system.drain(system.consume(broker, queue)))) == sorted(sent)


@pytest.mark.parametrize("code", ["25006", "57P03", "53200", "57014", "55P03", "XX000"])
async def test_what_the_server_cannot_do_now_may_be_tried_again(
    broker: Broker, system: System, postgres_url: str, database: asyncpg.Connection, code: str
) -> None:
    await system.declare(broker, "work")
    schema = postgres_url.rpartition("=")[2]
    await database.execute(f"""
        CREATE FUNCTION {schema}.no() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN RAISE SQLSTATE '{code}' USING MESSAGE = 'not now'; END$$;
        CREATE TRIGGER no BEFORE INSERT ON {schema}.messages EXECUTE FUNCTION {schema}.no()""")
    with pytest.raises(BrokerUnavailable) as caught:
        await broker.publish(messages("work", 1))
    assert "\n" not in str(caught.value)
    await database.execute(f"DROP TRIGGER no ON {schema}.messages")
    await system.publish(broker, messages("work", 1))


async def test_settings_of_the_role_do_not_reach_it(
    postgres_url: str, stranger: str, database: asyncpg.Connection
) -> None:
    await database.execute(f"""
        GRANT CREATE ON DATABASE penstock TO {stranger};
        ALTER ROLE {stranger} SET default_transaction_isolation TO serializable;
        ALTER ROLE {stranger} SET default_transaction_read_only TO on;
        ALTER ROLE {stranger} SET statement_timeout TO 1;
        ALTER ROLE {stranger} SET search_path TO nowhere""")
    broker = PostgresBroker(as_role(postgres_url, stranger))
    await broker.declare(Queue("work"))
    assert list(await broker.publish(messages("work", 100))) == [None] * 100
    await broker.close()
    await database.execute(f"REVOKE CREATE ON DATABASE penstock FROM {stranger}")


async def test_a_name_that_is_too_long_is_an_error_and_no_outage(broker: Broker) -> None:
    with pytest.raises(BrokerError) as caught:
        await broker.declare(Queue("".join(chr(0x4E00 + number % 20000) for number in range(9000))))
    assert not isinstance(caught.value, BrokerUnavailable)


# -- the schema


async def test_many_who_come_first_make_one_schema(postgres_url: str) -> None:
    brokers = [PostgresBroker(postgres_url) for _ in range(8)]
    await asyncio.gather(*(broker.open() for broker in brokers))
    await asyncio.gather(*(broker.declare(Queue("work")) for broker in brokers))
    assert list(await brokers[0].publish(messages("work", 1))) == [None]
    await asyncio.gather(*(broker.close() for broker in brokers))


async def test_a_later_version_and_a_schema_of_somebody_else_are_refused(
    postgres_url: str, database: asyncpg.Connection
) -> None:
    schema = postgres_url.rpartition("=")[2]
    await database.execute(f"CREATE SCHEMA {schema}; CREATE TABLE {schema}.queues (mine int)")
    assert "not one of Penstock's" in await refusal(postgres_url)
    await database.execute(f"DROP SCHEMA {schema} CASCADE")
    broker = PostgresBroker(postgres_url)
    await broker.open()
    await broker.close()
    await database.execute(f"UPDATE {schema}.version SET version = 99")
    assert "version 99" in await refusal(postgres_url)


async def test_a_schema_that_was_dropped_is_made_again(
    broker: Broker, system: System, postgres_url: str, database: asyncpg.Connection
) -> None:
    await system.declare(broker, "work")
    await database.execute(f"DROP SCHEMA {postgres_url.rpartition('=')[2]} CASCADE")
    assert [type(one) for one in await broker.publish(messages("work", 1))] == [Unroutable]
    queue = await system.declare(broker, "work")
    sent = await system.publish(broker, messages("work", 1))
    assert ids(await system.take(system.consume(broker, queue))) == sent


async def test_who_consumed_in_a_schema_that_was_dropped_does_so_again(
    broker: Broker, system: System, postgres_url: str, database: asyncpg.Connection
) -> None:
    first = await system.declare(broker, "first", topics=("news", "old"))
    second = await system.declare(broker, "second")
    assert broker.admin is not None
    await broker.admin.unbind("first", ["old"])
    consuming = [system.consume(broker, queue, lease=0.6) for queue in (first, second)]
    await system.publish(broker, messages("second", 1))
    (held,) = await system.take(consuming[1])
    assert await consuming[0].receive(1, 0) == []
    for _ in range(2):
        await database.execute(f"DROP SCHEMA {postgres_url.rpartition('=')[2]} CASCADE")
        sent: list[str] = []

        async def routable(sent: list[str] = sent) -> bool:
            given = [*messages("news", 1), *messages("second", 1)]
            await asyncio.gather(*(one.receive(0, 0) for one in consuming))
            if any(await broker.publish(given)):
                return False
            sent += ids(given)
            return True

        await eventually(routable)
        assert held.lost
        assert await consuming[1].settle(acks([held])) == [held]
        got = [*await system.take(consuming[0]), *await system.take(consuming[1])]
        assert ids(got) == sent[-2:]
        assert [one.queue for one in got] == ["first", "second"]
        assert all(one.consuming for one in consuming)
        held = got[1]
    assert [type(one) for one in await broker.publish(messages("old", 1))] == [Unroutable]


async def test_a_dead_letter_after_the_schema_was_dropped_finds_its_queue(
    broker: Broker, system: System, postgres_url: str, database: asyncpg.Connection
) -> None:
    queue = await system.declare(broker, "work")
    await system.declare(broker, "work.dead")
    subscription = system.consume(broker, queue, lease=30)
    await system.publish(broker, messages("work", 1))
    (held,) = await system.take(subscription)
    await database.execute(f"DROP SCHEMA {postgres_url.rpartition('=')[2]} CASCADE")
    moved = message("work.dead", held.raw, id=held.id)
    assert await subscription.settle([Move(held, "work.dead", moved)]) == [held]
    assert held.lost


async def test_no_life_and_no_version_is_given_twice_though_the_schema_was_dropped(
    postgres_url: str, database: asyncpg.Connection
) -> None:
    schema = postgres_url.rpartition("=")[2]
    store = PostgresStore(postgres_url)
    await store.open()
    (before,) = await store.apply([Put("office", b"1")])
    await database.execute(f"DROP SCHEMA {schema} CASCADE")
    assert await store.get(["office"]) == [None]
    (after,) = await store.apply([Put("office", b"2")])
    assert before is not None
    assert after is not None
    assert after > before
    assert await database.fetchval(f"SELECT last_value FROM {schema}.consumers_id_seq") > before
    await store.close()


async def test_a_forged_notification_disturbs_nobody(
    broker: Broker, system: System, postgres_url: str, database: asyncpg.Connection
) -> None:
    queue = await system.declare(broker, "work")
    subscription = system.consume(broker, queue)
    await system.blocked(subscription)
    for payload in ("", ";", "x;y", "1,2", "*", "-1;99999999999999", "{}"):
        await database.execute("SELECT pg_notify($1, $2)", f"penstock:{postgres_url.rpartition('=')[2]}", payload)
    sent = await system.publish(broker, messages("work", 1))
    assert ids(await system.take(subscription)) == sent


# -- its own ways


async def test_who_waits_asks_for_nothing(broker: Broker, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat and the look for the dead; no polling."""
    queue = await system.declare(broker, "work")
    subscription = system.consume(broker, queue, lease=30)
    await subscription.receive(1, 0.5)
    asked = 0
    run = Pool.run

    async def counted(pool: Pool, work: object) -> object:
        nonlocal asked
        asked += 1
        return await run(pool, work)  # type: ignore[arg-type]

    monkeypatch.setattr(Pool, "run", counted)
    assert await subscription.receive(1, 3.0) == []
    assert asked <= 2


async def test_what_is_given_back_may_be_in_hand_again_before_it_is_answered(broker: Broker, system: System) -> None:
    queue = await system.declare(broker, "work", ordered=True)
    await system.publish(broker, [message("work", key="k")])
    subscription = system.consume(broker, queue)
    for _ in range(150):
        [held] = await system.take(subscription)
        receiving = asyncio.create_task(subscription.receive(1, system.harness.patience))
        move = Move(held, "work", message("work", id=held.id, key="k"))
        assert list(await subscription.settle([move])) == []
        [again] = await system.woken(receiving)
        assert list(await subscription.settle([Move(again, "work", message("work", id=held.id, key="k"))])) == []


async def test_an_acknowledgement_whose_answer_was_lost_is_no_loss(
    broker: Broker, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 3))
    lost: list[object] = []
    subscription = system.consume(broker, queue, on_lost=lost.extend)
    held = await system.take(subscription, 3)
    run = Pool.run

    async def cut(pool: Pool, work: object) -> object:
        await run(pool, work)  # type: ignore[arg-type]
        raise BrokerUnavailable("the line broke")

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "run", cut)
        with pytest.raises(BrokerUnavailable):
            await subscription.settle(acks(held[:2]))
    assert list(await subscription.settle(acks(held[:2]))) == []
    assert list(await subscription.settle([Ack(held[2])])) == []
    assert lost == []


async def test_a_claim_that_a_crash_undid_is_known_as_lost(
    broker: Broker, system: System, postgres_url: str, database: asyncpg.Connection
) -> None:
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 2))
    lost: list[object] = []
    subscription = system.consume(broker, queue, on_lost=lost.extend)
    first, second = await system.take(subscription, 2)
    schema = postgres_url.rpartition("=")[2]
    await database.execute(f"UPDATE {schema}.messages SET owner = NULL WHERE seq = $1", first.token)
    refused = await subscription.settle(acks([first, second]))
    assert [one is first for one in refused] == [True]
    assert lost == [first]
    assert ids(await system.take(subscription)) == [first.id]


async def test_a_long_queue_is_claimed_as_fast_as_a_short_one(
    broker: Broker, system: System, postgres_url: str, database: asyncpg.Connection
) -> None:
    """No statistics, no sorting: by index, whatever the planner believes of the table."""
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 10))
    schema = postgres_url.rpartition("=")[2]
    await database.execute(f"ANALYZE {schema}.messages")  # what it believes is that there are ten
    await database.execute(f"""
        INSERT INTO {schema}.messages (queue, priority, meta, body)
        SELECT queue, priority, meta, body FROM {schema}.messages, generate_series(1, 10000)""")
    subscription = system.consume(broker, queue)
    await system.take(subscription, 100)
    took = []
    for _ in range(20):
        began = time.perf_counter()
        await subscription.settle(acks(await subscription.receive(100, 1)))
        took.append(time.perf_counter() - began)
    assert sorted(took)[len(took) // 2] < 0.05


# -- unbinding


@pytest.mark.parametrize("kind", [{"ordered": True}, {"max_length": 10}])
async def test_what_was_admitted_is_stored_though_its_only_queue_is_unbound_meanwhile(
    system: System, broker: Broker, database: asyncpg.Connection, postgres_url: str, kind: dict[str, Any]
) -> None:
    queue = await system.declare(broker, "work", topics=("news",), **kind)
    assert isinstance(broker, PostgresBroker)
    transaction = database.transaction()
    await transaction.start()
    [outcome] = await broker.publish_within([message("news", key="k", id="first")], database)
    assert outcome is None
    publishing = asyncio.create_task(broker.publish([message("news", key="k", id="second")]))
    await eventually(lambda: waits(postgres_url))
    await system.admin(await system.connect()).unbind("work", ["news"])
    assert not publishing.done()
    await transaction.commit()
    assert await publishing == [None]
    [outcome] = await broker.publish([message("news")])
    assert isinstance(outcome, Unroutable)
    assert ids(await system.drain(system.consume(broker, queue))) == ["first", "second"]


async def waits(url: str) -> bool:
    """Whether somebody waits for a lock to publish in this schema."""
    schema = parse_address(url, None).schema
    connection = await asyncpg.connect(postgres_database())
    try:
        found = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE $1",
            f'%"{schema}".publish(%',
        )
        return bool(found)
    finally:
        await connection.close()
