"""Faults that are Redis's own: consumers that die or sleep, a server that forgets, fills up, or was away for long."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
from collections import Counter
from pathlib import Path

import pytest

from penstock import App, Message
from penstock.brokers.base import Broker, Move, Queue
from penstock.brokers.redis import RedisBroker
from penstock.errors import BrokerError, BrokerUnavailable, StorageFull, Unroutable
from penstock.message import Delivery
from penstock.redis.line import Line, Word
from penstock.stores.base import Delete, Put
from penstock.stores.redis import RedisStore
from penstock.testing.conformance.harness import Harness, System, acks, ids, message, messages
from penstock.testing.faults import Proxy, RedisNode, halt, seconds_until, wait_until
from tests.faults.scenes import LEASE, PREFETCH, RedisScene
from tests.helpers import eventually

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(180)]


def test_a_dead_consumers_messages_are_taken_over_within_the_lease(redis: RedisScene) -> None:
    with redis.consumers(2) as consumers:
        wait_until(lambda: redis.declared() and redis.queues()["slow"].consumers == 2, "both consume", 20)
        redis.publish("slow", ["first"])
        wait_until(lambda: redis.ledger.count("started"), "it runs", 20)
        pid = next(entry.pid for entry in redis.ledger.entries() if entry.event == "started")
        consumers.kill(next(process for process in consumers.running if process.pid == pid))
        took = seconds_until(lambda: redis.ledger.count("finished"), "taken over", LEASE + 10)
        print(f"taken over after {took:.1f} s, with a lease of {LEASE} s")
        assert took <= LEASE + 2 + 1, "one second more for a busy machine"
        (survivor,) = consumers.running
        assert [entry.pid for entry in redis.ledger.entries() if entry.event == "finished"] == [survivor.pid]


def test_the_late_settlements_of_a_zombie_are_refused(redis: RedisScene) -> None:
    """SIGSTOP past the lease, then SIGCONT: what it held has gone to another, and stays gone."""
    total = 60
    with redis.consumers(1) as consumers:
        confirmed = redis.publish("work", list(range(total)))
        wait_until(lambda: redis.ledger.count("started") >= 4, "it runs", 20, pause=0.001)
        (zombie,) = consumers.running
        halt(zombie.pid)
        assert redis.in_hand("work").unsettled, "it was stopped too late to hold anything: make total larger"
        consumers.start()
        wait_until(lambda: len(redis.ledger.times("finished")) == total, "another finishes all", 30)
        wait_until(lambda: not redis.left(), "all are settled", 30)
        before = redis.ledger.count("finished")
        zombie.send_signal(signal.SIGCONT)
        wait_until(lambda: "lost to other consumers" in consumers.log, "it learns of its loss", 20)
        again = redis.publish("work", ["more"])
        wait_until(lambda: set(again) <= set(redis.ledger.times("finished")), "consuming goes on", 20)
        assert consumers.send(zombie, signal.SIGTERM) == 0
    assert set(redis.ledger.times("finished")) == {*confirmed, *again}
    assert redis.ledger.count("finished") - before <= PREFETCH + 1, "at most what it was running ends twice"


async def test_who_was_cut_off_with_the_server_for_longer_than_the_lease_keeps_what_it_holds(
    redis_node: RedisNode, tmp_path: Path
) -> None:
    """A server that was away heard nobody: that is no reason to give up those who are there again."""
    system = System(Harness(connect=lambda: RedisBroker(redis_node.url(tmp_path.name, timeout=1))))
    brokers = [await system.connect(), await system.connect()]
    queue = await system.declare(brokers[0], "work")
    await system.publish(brokers[0], messages("work", 2))
    lost: list[Delivery] = []
    subscriptions = [system.consume(broker, queue, prefetch=1, lease=LEASE, on_lost=lost.extend) for broker in brokers]
    held = [(await system.take(one))[0] for one in subscriptions]
    redis_node.kill()
    await asyncio.sleep(LEASE * 1.5)
    redis_node.start()
    await asyncio.sleep(LEASE)
    for subscription, delivery in zip(subscriptions, held, strict=True):
        assert list(await subscription.settle(acks([delivery]))) == []
    assert not lost
    await system.close()


async def test_what_was_on_its_way_on_a_silent_line_arrives_once(redis_node: RedisNode, tmp_path: Path) -> None:
    url = redis_node.url(tmp_path.name)
    publisher = RedisBroker(url)
    await publisher.declare(Queue("work"))
    async with Proxy(redis_node.port) as proxy:
        system = System(Harness(connect=lambda: RedisBroker(redis_node.url(tmp_path.name, proxy.port, timeout=1))))
        broker = await system.connect()
        subscription = system.consume(broker, Queue("work"))
        assert await subscription.receive(1, 0) == []
        for _ in range(5):
            sent = await system.publish(publisher, messages("work", 3))
            taken: list[Delivery] = []
            receiving = asyncio.create_task(subscription.receive(10, 5.0))
            await asyncio.sleep(0)
            proxy.swallow()  # what the server says from now on
            with contextlib.suppress(BrokerUnavailable):
                taken = await receiving
            proxy.restore()
            while len(taken) < 3:
                try:
                    taken += await subscription.receive(10, 5.0)
                except BrokerUnavailable:
                    await asyncio.sleep(0.05)
            assert sorted(ids(taken)) == sorted(sent)
            assert {one.redelivered for one in taken} == {0}
            assert not await subscription.settle(acks(taken))
        await system.close()
    await publisher.close()


@pytest.mark.parametrize("how", ["FLUSHALL", "the streams are deleted", "SCRIPT FLUSH"])
async def test_a_server_that_forgot_everything_is_consumed_again(
    redis_node: RedisNode, tmp_path: Path, how: str
) -> None:
    handled: Counter[str] = Counter()
    app = App(redis_node.url(tmp_path.name), prefetch=PREFETCH, lease=LEASE)

    @app.route("work", topics=("news",))
    async def work(message: Message) -> None:
        handled[message.id] += 1

    async with app:
        first = await app.publish("work", 1)
        await eventually(lambda: handled[first], "the first is handled")
        if how == "the streams are deleted":
            prefix = RedisBroker(redis_node.url(tmp_path.name)).prefix
            redis_node.ask("DEL", f"{prefix}stream:0:work")
        else:
            redis_node.ask(*how.split())

        async def published() -> bool:
            try:
                found.append(await app.publish("news", 2, timeout=2))
            except Exception:
                return False
            return True

        found: list[str] = []
        await eventually(published, "there is a queue again", 10)
        await eventually(lambda: handled[found[0]], "what came after is handled", 10)
        assert app.consuming


async def test_whatever_was_declared_is_declared_again_when_it_is_needed(redis_node: RedisNode, tmp_path: Path) -> None:
    """Dead letters after FLUSHALL: nobody consumes that queue, so nobody has missed it."""
    system = System(Harness(connect=lambda: RedisBroker(redis_node.url(tmp_path.name))))
    broker = await system.connect()
    assert isinstance(broker, RedisBroker)
    queue = await system.declare(broker, "work", topics=("a",))
    await system.declare(broker, "work", topics=("b",))
    await system.declare(broker, "work")
    await system.declare(broker, "work.dead", topics=("sad",))
    subscription = system.consume(broker, queue, lease=LEASE)
    await system.publish(broker, messages("work", 1))
    await system.take(subscription)
    redis_node.ask("FLUSHALL")
    waiting = asyncio.create_task(subscription.receive(1, 20))

    async def bindings() -> list[tuple[str, ...] | None]:
        return [info.bindings for info in await system.admin(broker).inspect()]

    async def declared() -> bool:
        return await bindings() == [("a", "b", "work"), ("sad", "work.dead")]

    await eventually(declared)
    prefix = broker.prefix
    redis_node.ask("DEL", f"{prefix}queue:work.dead", f"{prefix}topics:work.dead", f"{prefix}bound:sad")
    await system.publish(broker, messages("a", 1))
    [held] = await waiting
    assert not await subscription.settle([Move(held, "work.dead", message("work", id="moved"))])
    await eventually(declared)
    await system.publish(broker, messages("b", 1))
    [held] = await system.take(subscription)
    with pytest.raises(BrokerError, match="not declared"):
        await subscription.settle([Move(held, "unknown", message("work"))])
    assert not await subscription.settle(acks([held]))
    await system.close()


async def test_what_was_unbound_stays_so_for_those_who_declared_it_before(
    redis_node: RedisNode, tmp_path: Path
) -> None:
    system = System(Harness(connect=lambda: RedisBroker(redis_node.url(tmp_path.name))))
    broker = await system.connect()
    assert isinstance(broker, RedisBroker)
    await system.declare(broker, "work", topics=("news", "olds"))
    await system.admin(await system.connect()).unbind("work", ["news"])
    assert await broker.declare_again()
    outcomes = await broker.publish([message("news"), message("olds"), message("work")])
    assert [type(outcome) for outcome in outcomes] == [Unroutable, type(None), type(None)]
    await system.declare(broker, "work", topics=("news",))
    redis_node.ask("FLUSHALL")
    await system.admin(broker).inspect()
    assert await broker.declare_again()
    assert await broker.publish([message("news"), message("olds"), message("work")]) == [None] * 3
    await system.close()


async def _fill(broker: Broker, queue: str, confirmed: list[str]) -> None:
    for size in (50_000, 10):
        while (outcome := await broker.publish([one := message(queue, b'"' + bytes(size) + b'"')])) == [None]:
            confirmed.append(one.id)
        assert isinstance(outcome[0], StorageFull)


async def test_a_consumer_can_begin_without_memory(tmp_path: Path) -> None:
    with RedisNode(tmp_path / "redis", maxmemory="12mb") as node:
        system = System(Harness(connect=lambda: RedisBroker(node.url())))
        broker = await system.connect()
        await system.declare(broker, "work")
        confirmed: list[str] = []
        await _fill(broker, "work", confirmed)
        await system.close()
        another = await system.connect()
        await system.declare(another, "work")
        await system.declare(another, "fresh")
        fresh: list[str] = []
        await _fill(another, "fresh", fresh)  # what the first connection's end gave back
        assert await system.admin(another).purge("fresh") == len(fresh)
        await _fill(another, "work", confirmed)
        app = App(node.url(), prefetch=PREFETCH, lease=LEASE)
        handled: set[str] = set()

        @app.route("work")
        async def work(message: Message) -> None:
            handled.add(message.id)

        async with app:
            await eventually(lambda: len(handled) == len(confirmed), "all is handled")
        assert handled == set(confirmed)
        await system.close()


async def test_who_connects_first_after_an_outage_connects_everybody(
    redis_node: RedisNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that reconnects by itself is still in its pause: nobody may stay deaf, now or after it."""
    monkeypatch.setattr("penstock.redis.listening.backoff_delay", lambda *_: 3600.0)
    system = System(Harness(connect=lambda: RedisBroker(redis_node.url(tmp_path.name))))
    broker = await system.connect()
    assert isinstance(broker, RedisBroker)
    queue = await system.declare(broker, "work")
    ears, other = broker.inbox(), broker.inbox()
    await ears.listen(frozenset({"news"}))
    subscription = system.consume(broker, queue)
    assert await system.silent(subscription)
    redis_node.kill()
    await eventually(lambda: not broker.listening.up)
    redis_node.start()
    waiting = asyncio.create_task(subscription.receive(1, 20))

    async def listens() -> bool:
        try:
            await other.listen(frozenset({"else"}))
        except BrokerUnavailable:
            return False
        return True

    await eventually(listens)
    await broker.broadcast(message("news"))
    assert len(await ears.receive(5)) == 1
    await system.publish(broker, messages("work", 1))
    async with asyncio.timeout(5):
        assert len(await waiting) == 1
    assert subscription.consuming
    await system.close()


async def test_a_server_that_falls_silent_while_it_is_listened_to_again_is_noticed(
    redis_node: RedisNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System(Harness(connect=lambda: RedisBroker(redis_node.url(tmp_path.name, timeout=0.5))))
    broker = await system.connect()
    assert isinstance(broker, RedisBroker)
    ears = broker.inbox()
    await ears.listen(frozenset({"news"}))
    say = Line.say
    lost: list[tuple[Word, ...]] = []

    def lossy(line: Line, *words: Word) -> None:
        if words[0] == "SUBSCRIBE" and not lost:
            lost.append(words)
        else:
            say(line, *words)

    monkeypatch.setattr(Line, "say", lossy)
    assert broker.listening._line is not None
    broker.listening._line.abort("is cut")
    await eventually(lambda: lost)
    assert not broker.listening.up
    await eventually(lambda: broker.listening.up)
    await broker.broadcast(message("news"))
    assert len(await ears.receive(5)) == 1
    await system.close()


async def test_a_heartbeat_waits_for_no_longer_than_the_lease_allows(redis_node: RedisNode, tmp_path: Path) -> None:
    """One line is dead, others would do; a connection is given so much time that the lease would be over."""
    system = System(Harness(connect=lambda: RedisBroker(redis_node.url(tmp_path.name, timeout=60))))
    broker = await system.connect()
    assert isinstance(broker, RedisBroker)
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 1))
    lost: list[Delivery] = []
    subscription = system.consume(broker, queue, lease=6, on_lost=lost.extend)
    held = await system.take(subscription)
    line, generation = await broker.link.line(), broker.link.generation
    assert line._transport is not None
    line._transport.pause_reading()
    await eventually(lambda: broker.link.generation > generation, "there is another line", 10)
    assert not await subscription.settle(acks(held))
    assert not lost
    await system.close()


async def test_nothing_is_left_of_what_was_closed_while_the_server_was_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.brokers.redis.subscription.LEAVE_WITHIN", 0.2)
    with RedisNode(tmp_path / "redis") as node:
        broker = RedisBroker(node.url())
        await broker.declare(Queue("work"))
        before = asyncio.all_tasks()
        subscription = broker.subscribe([Queue("work")], prefetch=1, lease=30, on_lost=lambda lost: None)
        node.pause()
        receiving = asyncio.create_task(subscription.receive(1, 30))
        await eventually(lambda: broker.listening._connecting is not None)
        await broker.close()
        async with asyncio.timeout(5):
            assert await receiving == []
        node.resume()
        await eventually(lambda: asyncio.all_tasks() <= before)
        await eventually(lambda: "name=penstock" not in node.ask("CLIENT", "LIST"))
        assert not broker.listening._listeners


async def test_without_memory_nothing_is_taken_and_what_there_is_goes_on(tmp_path: Path) -> None:
    with RedisNode(tmp_path / "redis", maxmemory="12mb") as node:
        system = System(Harness(connect=lambda: RedisBroker(node.url())))
        broker = await system.connect()
        queue = await system.declare(broker, "work")
        await system.declare(broker, "aside")
        subscription = system.consume(broker, queue, lease=LEASE)
        confirmed: list[str] = []
        while True:
            [outcome] = await broker.publish([one := message("work", bytes(100_000))])
            if outcome is not None:
                break
            confirmed.append(one.id)
        assert isinstance(outcome, StorageFull)
        assert "maxmemory" in str(outcome)
        assert "\n" not in str(outcome)
        store = RedisStore(node.url())
        small = [Put(f"k{number}", bytes(1000)) for number in range(5000)]  # one of them may still fit
        with pytest.raises(BrokerUnavailable, match="maxmemory"):
            await asyncio.gather(*(store.apply([one]) for one in small))
        assert await store.apply([Delete("k")]) == [0]
        held = await system.take(subscription, 2)
        await asyncio.sleep(2 * LEASE)  # heartbeats need no room
        assert not await subscription.settle(acks(held[:1]))
        rest = await system.take(subscription, len(confirmed) - 2)
        assert sorted(ids([*held, *rest])) == sorted(confirmed)
        assert not await subscription.settle(acks([held[1], *rest]))
        await system.publish(broker, messages("work", 1))
        assert await store.apply([Put("k", b"v")]) != [None]
        await store.close()
        await system.close()


async def test_without_disk_nothing_is_taken_until_there_is_room(tmp_path: Path) -> None:
    limited = ["sh", "-c", "trap '' XFSZ; ulimit -S -f 2000; exec \"$@\"", "sh"]
    with RedisNode(tmp_path / "redis", within=limited, appendfsync="everysec") as node:
        system = System(Harness(connect=lambda: RedisBroker(node.url())))
        broker = await system.connect()
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue)
        confirmed: list[str] = []
        while True:
            [outcome] = await broker.publish([one := message("work", bytes(50_000))])
            if outcome is not None:
                break
            confirmed.append(one.id)
            await asyncio.sleep(0.01)
        assert isinstance(outcome, StorageFull)
        assert "disk" in str(outcome)
        assert "\n" not in str(outcome)
        with pytest.raises(BrokerUnavailable):
            await subscription.receive(10, 1.0)
        assert node.pid is not None
        resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        async def healed() -> bool:
            return await broker.publish([message("work", id="healed")]) == [None]

        await eventually(healed)
        taken = await system.take(subscription, len(confirmed))
        assert ids(taken) == confirmed
        assert not await subscription.settle(acks(taken))
        await system.close()


async def test_what_was_confirmed_before_a_kill_is_there_after_it(redis_node: RedisNode, tmp_path: Path) -> None:
    system = System(Harness(connect=lambda: RedisBroker(redis_node.url(tmp_path.name))))
    broker = await system.connect()
    queue = await system.declare(broker, "work", topics=("news",))
    store = RedisStore(redis_node.url(tmp_path.name))
    sent = await system.publish(broker, messages("news", 200))
    [version] = await store.apply([Put("k", b"v")])
    redis_node.kill()
    redis_node.start()
    await asyncio.sleep(0.05)  # to hear of it
    [entry] = await store.get(["k"])
    assert entry is not None
    assert (entry.value, entry.version) == (b"v", version)
    assert ids(await system.take(system.consume(broker, queue), 200)) == sent
    await store.close()
    await system.close()
