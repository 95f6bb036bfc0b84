"""What is Redis's own: lost answers, keys that somebody deleted, order within a key, clusters."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from penstock.brokers.base import Broker, Move, Queue, Release
from penstock.brokers.redis import RedisBroker, lua
from penstock.errors import BrokerUnavailable
from penstock.redis.link import Link, Script
from penstock.testing.conformance.harness import Harness, System, acks, ids, message, messages
from penstock.testing.faults import RedisNode
from tests.helpers import eventually
from tests.servers import require

pytestmark = pytest.mark.blocks  # servers of our own are started and asked


@pytest_asyncio.fixture
async def system(redis_url: str) -> AsyncIterator[System]:
    system = System(Harness(connect=lambda: RedisBroker(redis_url)))
    yield system
    await system.close()


@pytest_asyncio.fixture
async def broker(system: System) -> RedisBroker:
    broker = await system.connect()
    assert isinstance(broker, RedisBroker)
    return broker


# -- lost answers, deleted streams


async def test_a_claim_whose_answer_is_lost_is_asked_for_again(
    system: System, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = await system.declare(broker, "work")
    sent = await system.publish(broker, messages("work", 5))
    subscription = system.consume(broker, queue)
    held = await system.take(subscription, 2)
    run = Link.run

    async def lossy(link: Link, script: Script, *rest: Any) -> Any:
        answer = await run(link, script, *rest)
        if script is lua.CLAIM:
            raise BrokerUnavailable("the answer is lost")
        return answer

    monkeypatch.setattr(Link, "run", lossy)
    with pytest.raises(BrokerUnavailable):
        await subscription.receive(10, 1.0)
    monkeypatch.undo()
    rest = await subscription.receive(10, 1.0)
    assert ids(held) + ids(rest) == sent
    assert {one.redelivered for one in rest} == {0}
    assert not await subscription.settle(acks([*held, *rest]))
    assert await system.silent(subscription)


@pytest.mark.parametrize("script", [lua.ACK, lua.SETTLE])
async def test_a_settlement_whose_answer_is_lost_may_be_made_again(
    system: System, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    queue = await system.declare(broker, "work")
    other = await system.declare(broker, "other")
    await system.publish(broker, messages("work", 1))
    subscription = system.consume(broker, queue)
    held = await system.take(subscription)
    items = acks(held) if script is lua.ACK else [Move(held[0], "other", message("work", id=held[0].id))]
    run = Link.run

    async def lossy(link: Link, asked: Script, *rest: Any) -> Any:
        answer = await run(link, asked, *rest)
        if asked is script:
            raise BrokerUnavailable("the answer is lost")
        return answer

    monkeypatch.setattr(Link, "run", lossy)
    with pytest.raises(BrokerUnavailable):
        await subscription.settle(items)
    monkeypatch.undo()
    assert list(await subscription.settle(items)) == []
    assert await system.silent(subscription)
    assert len(await system.consume(broker, other).receive(10, 0.1)) == (script is lua.SETTLE)


async def test_a_group_that_somebody_destroyed_is_made_again(system: System, broker: RedisBroker) -> None:
    queue = await system.declare(broker, "work")
    subscription = system.consume(broker, queue)
    await system.publish(broker, messages("work", 1))
    await system.drain(subscription)
    await broker.link.call("XGROUP", "DESTROY", f"{broker.prefix}stream:0:work", "penstock")
    sent = await system.publish(broker, messages("work", 2))
    assert ids(await system.drain(subscription)) == sent


async def test_nothing_is_left_of_what_is_done(system: System, broker: RedisBroker) -> None:
    queue = await system.declare(broker, "work", ordered=True)
    subscription = system.consume(broker, queue)
    sent = await system.publish(broker, [message("work", key=f"k{n % 3}", delay=0.05) for n in range(30)])
    taken: list[str] = []
    while len(taken) < len(sent):
        taken += ids(await system.drain(subscription))
    await subscription.close()
    _, keys = await broker.link.call("SCAN", 0, "MATCH", f"{broker.prefix}*", "COUNT", 100_000)
    left = {key.decode().removeprefix(broker.prefix) for key in keys}
    assert left <= {
        "queues", "queue:work", "bound:work", "topics:work", "streams:work", "stream:0:work", "parkings",
        "looked", "idle",
    }  # fmt: skip
    assert await broker.link.call("XLEN", f"{broker.prefix}stream:0:work") == 0


async def test_what_is_given_back_goes_before_what_is_new(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    sent = await system.publish(broker, messages("work", 5))
    first = system.consume(broker, queue)
    await system.take(first, 2)
    await first.close()
    assert ids(await system.take(system.consume(broker, queue), 5)) == sent


async def test_the_order_of_a_key_holds_through_everything_that_may_happen_to_its_messages(
    system: System, broker: RedisBroker
) -> None:
    rng = random.Random(3)
    queue = await system.declare(broker, "work", ordered=True)
    lane = await system.declare(broker, "work.lane", ordered=True, lane_of="work")
    sent = [message("work", str(number).encode(), key=f"k{number % 5}", priority=number % 3) for number in range(200)]
    await system.publish(broker, sent)
    done: dict[str | None, list[int]] = {}
    finished = 0

    async def consume(queue: Queue) -> None:
        nonlocal finished
        subscription = system.consume(broker, queue, prefetch=4)
        while finished < len(sent):
            for one in await subscription.receive(4, 0.05):
                again = one.outgoing()
                again.priority = rng.randrange(256)
                again.delay = rng.choice((0.0, 0.0, 0.02))
                verdict = rng.random()
                if verdict < 0.2:
                    await subscription.settle([Release(one, rng.choice((0.0, 0.02)))])
                elif verdict < 0.4:
                    to = rng.choice(("work", "work.lane"))
                    await subscription.settle([Move(one, to, again)])
                elif verdict < 0.5:
                    await subscription.close()
                    subscription = system.consume(broker, queue, prefetch=4)
                    break
                else:
                    done.setdefault(one.key, []).append(int(one.raw))
                    finished += 1
                    assert not await subscription.settle(acks([one]))

    async with asyncio.timeout(60):
        await asyncio.gather(*(consume(one) for one in (queue, queue, lane, lane)))
    assert done == {f"k{key}": list(range(key, 200, 5)) for key in range(5)}
    assert await broker.link.call("HLEN", f"{broker.prefix}busy:work") == 0
    assert [info.ready for info in await broker.admin.inspect()] == [0, 0]


# -- clusters


async def test_in_a_cluster_our_keys_are_found_on_whatever_node_they_are(tmp_path: Path) -> None:
    require("redis")
    with (
        RedisNode(tmp_path / "a", cluster_enabled="yes", cluster_node_timeout=2000) as one,
        RedisNode(tmp_path / "b", cluster_enabled="yes", cluster_node_timeout=2000) as two,
    ):
        one.ask("CLUSTER", "ADDSLOTSRANGE", "0", "8191")
        two.ask("CLUSTER", "ADDSLOTSRANGE", "8192", "16383")
        one.ask("CLUSTER", "MEET", "127.0.0.1", str(two.port))
        await eventually(
            lambda: all("cluster_state:ok" in node.ask("CLUSTER", "INFO") for node in (one, two)), "up", 20
        )
        found = set()
        for vhost in ("a", "b", "c", "d"):
            system = System(Harness(connect=lambda vhost=vhost: RedisBroker(one.url(vhost))))  # type: ignore[misc]
            broker = await system.connect()
            assert isinstance(broker, RedisBroker)
            queue = await system.declare(broker, "work", topics=("news",))
            inbox = broker.inbox()
            await inbox.listen(frozenset({"all"}))
            subscription = system.consume(broker, queue)
            receiving = await system.blocked(subscription)
            sent = await system.publish(await system.connect(), [message("news", key="k", priority=3)])
            assert ids(await system.woken(receiving)) == sent
            await broker.broadcast(message("all"))
            assert len(await inbox.receive(5.0)) == 1
            found.add(broker.link.address.port)
            await system.close()
        assert found == {one.port, two.port}
