"""PostgreSQL stopped and killed under load, lines to it cut, and consumers that hang."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable

import pytest

from penstock import App, Message
from penstock.brokers.postgres import PostgresBroker
from penstock.errors import BrokerUnavailable, PublishError
from penstock.stores.base import Put
from penstock.stores.postgres import PostgresStore
from penstock.testing.faults import PostgresNode, Proxy, halt, seconds_until, wait_until
from tests.faults.scenes import LEASE, PREFETCH, QUEUES, PostgresScene
from tests.faults.test_server import Publisher
from tests.helpers import eventually

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(300)]

RESTARTS = int(os.environ.get("FAULTS_RESTARTS", "10"))
SUBSCRIPTIONS = [part for queue in QUEUES for part in (queue, f"{queue}.suspects")]
BACK_WITHIN = 10.0  # seconds from the moment it serves again until messages are handled


def stop(node: PostgresNode) -> None:
    node.stop()


def kill(node: PostgresNode) -> None:
    node.kill()


@pytest.mark.parametrize("end", [stop, kill])
def test_a_restart_of_the_server_loses_nothing_and_needs_none_of_ours(
    elephant: PostgresScene, postgres_node: PostgresNode, end: Callable[[PostgresNode], None]
) -> None:
    scene, node, backs = elephant, postgres_node, []
    with scene.consumers(2) as consumers:
        first = {process.pid for process in consumers.running}
        wait_until(scene.declared, "the queues are declared", 20)
        with Publisher(scene.client, 20_000) as publisher:
            for _ in range(RESTARTS):
                before = scene.ledger.count("finished")
                wait_until(lambda: scene.ledger.count("finished") >= before + 100, "it is at work", 30)  # noqa: B023
                end(node)
                node.start()
                before = scene.ledger.count("finished")
                back = seconds_until(lambda: scene.ledger.count("finished") > before, "it works again", 60)  # noqa: B023
                backs.append(back)
        scene.wait_for_all(publisher.confirmed)
        assert {process.pid for process in consumers.running} == first
        assert all(process.poll() is None for process in consumers.running), consumers.log[-2000:]
    finished = scene.ledger.times("finished")
    lost = set(publisher.confirmed) - set(finished)
    duplicates = sum(finished[id] - 1 for id in publisher.confirmed)
    times = ", ".join(f"{back:.1f}" for back in backs)
    print(
        f"{len(backs)} × {end.__name__}: lost {len(lost)} of {len(publisher.confirmed)}, duplicates {duplicates}, "
        f"consuming again after {times} s"
    )
    assert publisher.confirmed
    assert not lost
    assert max(backs) <= BACK_WITHIN
    assert scene.dead() == []


def test_a_dead_consumers_messages_are_taken_over_within_the_lease(postgres: PostgresScene) -> None:
    scene = postgres
    with scene.consumers(1) as consumers:
        ids = scene.publish("slow", ["x"] * 12)  # seconds of work for one; all of them in its hands
        wait_until(lambda: scene.ledger.count("started"), "it runs", 20)
        (victim,) = consumers.running
        its = ", ".join(str(id) for (id,) in scene.query("SELECT id FROM {s}.consumers"))
        consumers.start()
        joined = "SELECT count(*) FROM {s}.consumers"
        wait_until(lambda: scene.query(joined) == [(2 * len(SUBSCRIPTIONS),)], "both consume", 20)
        consumers.kill(victim)
        held = f"SELECT count(*) FROM {{s}}.messages WHERE owner IN ({its})"
        assert scene.query(held) != [(0,)]
        took = seconds_until(lambda: scene.query(held) == [(0,)], "taken over", LEASE + 10)
        print(f"taken over after {took:.1f} s, with a lease of {LEASE} s")
        assert took <= LEASE + 2
        scene.wait_for_all(ids)


def test_the_late_settlements_of_a_zombie_are_refused(postgres: PostgresScene) -> None:
    """SIGSTOP past the lease, then SIGCONT: what it held has gone to another, and stays gone."""
    scene, total = postgres, 60
    with scene.consumers(1) as consumers:
        ids = scene.publish("work", list(range(total)))
        wait_until(lambda: scene.ledger.count("started") >= 4, "it runs", 20, pause=0.001)
        (zombie,) = consumers.running
        halt(zombie.pid)
        if not scene.query("SELECT count(owner) FROM {s}.messages")[0][0]:
            pytest.fail("it was stopped too late to hold anything: make total larger")
        consumers.start()
        wait_until(lambda: len(scene.ledger.times("finished")) == total, "another finishes all", 30)
        wait_until(lambda: not scene.left(), "all are settled", 30)
        before = scene.ledger.count("finished")
        zombie.send_signal(signal.SIGCONT)
        wait_until(lambda: "lost to other consumers" in consumers.log, "it learns of its loss", 20)
        again = scene.publish("work", ["more"])
        wait_until(lambda: set(again) <= set(scene.ledger.times("finished")), "consuming goes on", 20)
        assert consumers.send(zombie, signal.SIGTERM) == 0
    finished = scene.ledger.times("finished")
    assert set(finished) == {*ids, *again}
    assert scene.ledger.count("finished") - before <= PREFETCH + 1, "at most what it was running ends twice"


async def test_cut_connections_lose_nothing(elephant: PostgresScene, postgres_node: PostgresNode) -> None:
    handled: Counter[str] = Counter()
    confirmed: list[str] = []
    schema = elephant.url.rpartition("=")[2]
    async with Proxy(postgres_node.port) as proxy:
        app = App(postgres_node.url(schema, proxy.port), prefetch=PREFETCH)

        @app.route("work", concurrency=4, backoff=(0.05, 0.2))
        async def work(message: Message) -> None:
            handled[message.id] += 1

        async with app:
            confirmed.append(await app.publish("work", "first"))
            while proxy.cuts < 60:
                with contextlib.suppress(PublishError):
                    confirmed += await app.publish_many("work", ["x"] * 10, timeout=10)
                await asyncio.sleep(0.05)
                proxy.cut()
            await eventually(lambda: app.consuming and set(confirmed) <= set(handled), "all are handled", 60)
    lost = set(confirmed) - set(handled)
    duplicates = sum(handled[id] - 1 for id in confirmed)
    print(f"{proxy.cuts} cuts: lost {len(lost)} of {len(confirmed)}, duplicates {duplicates}")
    assert not lost


@pytest.mark.parametrize("who", ["the line swallows everything", "the server is frozen"])
async def test_a_half_open_connection_is_noticed(
    elephant: PostgresScene, postgres_node: PostgresNode, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.postgres.listener.LOOK", 1.0)
    monkeypatch.setattr("penstock.postgres.listener.WITHIN", 2.0)
    monkeypatch.setattr("penstock.postgres.pool.WITHIN", 3.0)
    handled: Counter[str] = Counter()
    schema = elephant.url.rpartition("=")[2]
    async with Proxy(postgres_node.port) as proxy:
        app = App(postgres_node.url(schema, proxy.port, timeout=2), prefetch=PREFETCH)

        @app.route("work")
        async def work(message: Message) -> None:
            handled[message.id] += 1

        async with app:
            id = await app.publish("work", "x")
            await eventually(lambda: handled[id], "it works")
            (proxy.swallow if "line" in who else postgres_node.pause)()
            began = time.monotonic()
            await eventually(lambda: not app.consuming, "it is noticed", 30)
            noticed = time.monotonic() - began
            (proxy.restore if "line" in who else postgres_node.resume)()
            began = time.monotonic()
            id = await app.publish("work", "y", timeout=30)
            await eventually(lambda: handled[id] and app.consuming, "it works again", 30)
            back = time.monotonic() - began
    print(f"{who}: noticed after {noticed:.1f} s, back {back:.1f} s after its end")
    assert noticed <= 6
    assert back <= BACK_WITHIN


async def test_a_restart_is_heard_of_by_those_who_follow(elephant: PostgresScene, postgres_node: PostgresNode) -> None:
    store, other = PostgresStore(elephant.url), PostgresStore(elephant.url)
    watch = store.watch()
    await watch.follow(["k"])
    await asyncio.to_thread(postgres_node.kill)
    with pytest.raises(BrokerUnavailable):
        await other.get(["k"])
    await asyncio.to_thread(postgres_node.start)
    assert await other.apply([Put("k", b"v", tell=True)]) != [None]
    async with asyncio.timeout(20):
        while "k" not in await watch.receive(20):
            pass
    await asyncio.gather(store.close(), other.close())


async def test_a_standby_is_read_only_and_says_so(postgres_node: PostgresNode) -> None:
    primary = PostgresBroker(postgres_node.url("standing_by"))
    await primary.open()
    await primary.close()
    standby = PostgresNode()
    try:
        await asyncio.to_thread(standby.copy_from, postgres_node)
        await asyncio.to_thread(standby.start)
        for schema in ("standing_by", "another"):
            broker = PostgresBroker(standby.url(schema))
            with pytest.raises(BrokerUnavailable, match="standby"):
                await broker.open()
            await broker.close()
    finally:
        await asyncio.to_thread(standby.__exit__, None, None, None)
