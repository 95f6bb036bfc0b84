"""What is Redis's own: lost answers, keys that somebody deleted, order within a key, clusters."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from penstock.brokers.base import Broker, Move, Queue, Release, Subscription
from penstock.brokers.redis import RedisBroker, lua
from penstock.errors import BrokerError, BrokerUnavailable
from penstock.message import Delivery
from penstock.redis.errors import NotNow
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


async def received(subscription: Subscription) -> list[Delivery]:
    """What comes next, from a server that may just be coming back."""

    async def tried() -> list[Delivery]:
        try:
            return await subscription.receive(10, 1.0)
        except BrokerUnavailable:
            return []

    found: list[Delivery] = await eventually(tried)
    return found


async def restarted(node: RedisNode, broker: Broker) -> None:
    """Kill a server, and start it with what it had saved; the broker is connected again."""
    node.kill()
    node.start()

    async def back() -> bool:
        try:
            assert isinstance(broker, RedisBroker)
            return bool(await broker.link.call("PING"))
        except BrokerUnavailable:
            return False

    await eventually(back)


# -- lost answers, deleted streams


@pytest.mark.parametrize("error", [BrokerUnavailable, BrokerError])
async def test_a_claim_whose_answer_is_lost_is_asked_for_again(
    system: System, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch, error: type[BrokerError]
) -> None:
    queue = await system.declare(broker, "work")
    sent = await system.publish(broker, messages("work", 5))
    subscription = system.consume(broker, queue)
    held = await system.take(subscription, 2)
    run = Link.run

    async def lossy(link: Link, script: Script, *rest: Any) -> Any:
        answer = await run(link, script, *rest)
        if script is lua.CLAIM:
            raise error("the answer is lost")
        return answer

    monkeypatch.setattr(Link, "run", lossy)
    with pytest.raises(error, match="is lost"):
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


def cluster_node(folder: Path) -> RedisNode:
    """One whose second port, 10,000 above the other, is none that the system gives to connections."""
    while (node := RedisNode(folder, cluster_enabled="yes", cluster_node_timeout=2000)).port > 22_700:
        pass
    return node


async def test_in_a_cluster_our_keys_are_found_on_whatever_node_they_are(tmp_path: Path) -> None:
    require("redis")
    with (
        cluster_node(tmp_path / "a") as one,
        cluster_node(tmp_path / "b") as two,
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


async def test_a_replica_in_a_cluster_leads_to_the_primary(tmp_path: Path) -> None:
    require("redis")
    with (
        cluster_node(tmp_path / "a") as one,
        cluster_node(tmp_path / "b") as two,
    ):
        one.ask("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        one.ask("CLUSTER", "MEET", "127.0.0.1", str(two.port))
        name = one.ask("CLUSTER", "MYID").split()[1]
        await eventually(lambda: two.ask("CLUSTER", "REPLICATE", name).startswith("+OK"), "it replicates", 20)
        system = System(Harness(connect=lambda: RedisBroker(two.url())))
        broker = await system.connect()
        assert isinstance(broker, RedisBroker)

        async def up() -> Queue | None:
            try:
                return await system.declare(broker, "work")
            except BrokerUnavailable:
                return None

        queue = await eventually(up)
        sent = await system.publish(broker, messages("work", 2))
        assert ids(await system.drain(system.consume(broker, queue))) == sent
        assert broker.link.address.port == one.port
        await system.close()


# -- what the server forgot, or remembers beside us


async def test_acknowledgements_that_the_server_forgot_are_made_again(tmp_path: Path) -> None:
    """It was brought back to where it had been: what it thinks that we hold comes again, while we live."""
    require("redis")
    with RedisNode(tmp_path / "redis", appendonly="no") as node:
        system = System(Harness(connect=lambda: RedisBroker(node.url())))
        broker = await system.connect()
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 3))
        lost: list[Delivery] = []
        subscription = system.consume(broker, queue, prefetch=3, lease=1.5, on_lost=lost.extend)
        held = await system.take(subscription, 3)
        node.ask("SAVE")
        assert not await subscription.settle(acks(held[:1]))
        await restarted(node, broker)
        again = await received(subscription)
        assert ids(again) == sent[:1]
        assert not await subscription.settle(acks([*held[1:], *again]))
        assert [(info.ready, info.unsettled) for info in await system.admin(broker).inspect()] == [(0, 0)]
        assert not lost
        await system.close()


async def test_a_claim_that_the_server_forgot_hands_out_nothing_twice(tmp_path: Path) -> None:
    require("redis")
    with RedisNode(tmp_path / "redis", appendonly="no") as node:
        system = System(Harness(connect=lambda: RedisBroker(node.url())))
        broker = await system.connect()
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue, prefetch=3, lease=5)
        assert await system.silent(subscription)
        await system.publish(broker, messages("work", 1))
        node.ask("SAVE")
        held = await system.take(subscription)
        await restarted(node, broker)
        sent = await system.publish(broker, messages("work", 1))
        again = await received(subscription)
        assert ids(again) == sent
        assert not await subscription.settle(acks([*held, *again]))
        assert [(info.ready, info.unsettled) for info in await system.admin(broker).inspect()] == [(0, 0)]
        await system.close()


async def test_a_claim_that_was_held_up_on_an_old_line_takes_nothing(system: System, broker: RedisBroker) -> None:
    queue = await system.declare(broker, "work")
    subscription = system.consume(broker, queue)
    assert await system.silent(subscription)
    claims: list[tuple[Any, ...]] = []
    run = Link.run

    async def recorded(link: Link, script: Script, *rest: Any) -> Any:
        if script is lua.CLAIM:
            claims.append(rest)
        return await run(link, script, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "run", recorded)
        assert await system.silent(subscription)
    line = await broker.link.line()
    line.abort("is cut")
    assert await system.silent(subscription)  # it compares on the new one
    sent = await system.publish(broker, messages("work", 2))
    assert await broker.link.run(lua.CLAIM, *claims[0]) == [b""]
    assert ids(await system.drain(subscription)) == sent


async def test_what_we_know_that_we_hold_is_not_sent_again_on_each_new_line(
    system: System, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, other = await system.declare(broker, "ключ x"), await system.declare(broker, "ordered", ordered=True)
    await system.publish(broker, [message("ключ x", priority=number % 3) for number in range(1100)])
    await system.publish(broker, [message("ordered", key=f"k{number}") for number in range(10)])
    subscription = system.consume(broker, queue, other)
    held = await system.take(subscription, 1110)
    answers: list[Any] = []
    run = Link.run

    async def recorded(link: Link, script: Script, *rest: Any) -> Any:
        answer = await run(link, script, *rest)
        if script is lua.RECALL:
            answers.append(answer)
        return answer

    monkeypatch.setattr(Link, "run", recorded)
    (await broker.link.line()).abort("is cut")
    assert await system.silent(subscription)
    assert answers == [[b""]]
    unheard = [subscription._held.pop(one.token) for one in held[5:]]  # type: ignore[attr-defined]
    (await broker.link.line()).abort("is cut")
    again = await system.take(subscription, len(unheard))
    assert sorted(ids(again)) == sorted(ids(unheard))
    assert not await subscription.settle(acks([*held[:5], *again]))


async def test_entries_that_are_none_of_ours_are_removed_and_keep_nothing_back(
    system: System, broker: RedisBroker, caplog: pytest.LogCaptureFixture
) -> None:
    queue = await system.declare(broker, "work")
    stream = f"{broker.prefix}stream:0:work"
    subscription = system.consume(broker, queue)
    await broker.link.call("XADD", stream, "*", "foo", "bar")
    sent = await system.publish(broker, messages("work", 1))
    await broker.link.call("XADD", stream, "*", "m", "[]", "b", "", "odd", "one")
    sent += await system.publish(broker, messages("work", 1))
    assert [info.ready for info in await system.admin(broker).inspect()] == [4]
    assert ids((await system.admin(broker).browse("work", 10))[0]) == sent
    assert ids(await system.drain(subscription)) == sent
    assert await broker.link.call("XLEN", stream) == 0
    assert sum("is no message" in record.message for record in caplog.records) == 2


async def test_entries_that_are_none_of_ours_keep_no_dead_consumer_from_being_replaced(
    system: System, broker: RedisBroker, caplog: pytest.LogCaptureFixture
) -> None:
    queue = await system.declare(broker, "work")
    sent = await system.publish(broker, messages("work", 1))
    await broker.link.call("XADD", f"{broker.prefix}stream:0:work", "*", "foo", "bar")
    sent += await system.publish(broker, messages("work", 1))
    assert await broker.run(lua.JOIN, "dead", 0.1, "work")
    assert len((await broker.run(lua.CLAIM, "dead", 0, 10, 1000, "work"))[1][2]) == 3  # type: ignore[index]
    subscription = system.consume(broker, queue, lease=0.6)
    taken = await system.take(subscription, 2)
    assert ids(taken) == sent
    assert not await subscription.settle(acks(taken))
    assert await broker.link.call("HLEN", f"{broker.prefix}consumers") == 1
    assert sum("is no message" in record.message for record in caplog.records) == 1


async def postponed(broker: RedisBroker) -> None:
    """Until a consumer that is dead has been given more time."""
    key = f"{broker.prefix}alive"
    before = await broker.link.call("ZSCORE", key, "dead")

    async def given() -> bool:
        return float(await broker.link.call("ZSCORE", key, "dead")) >= float(before) + 1.0

    await eventually(given)


async def test_a_dead_consumer_that_cannot_be_replaced_keeps_nobody_from_living_and_is_replaced_later(
    system: System, broker: RedisBroker
) -> None:
    queue = await system.declare(broker, "work")
    await system.declare(broker, "other")
    sent = await system.publish(broker, messages("other", 1))
    assert await broker.run(lua.JOIN, "dead", 0.1, "other")
    assert await broker.run(lua.CLAIM, "dead", 0, 10, 1000, "other")
    await broker.link.call("RENAME", f"{broker.prefix}streams:other", f"{broker.prefix}aside")
    await broker.link.call("SET", f"{broker.prefix}streams:other", "theirs")
    subscription = system.consume(broker, queue, lease=0.6)
    waiting = await system.blocked(subscription)
    await postponed(broker)
    await broker.link.call("RENAME", f"{broker.prefix}aside", f"{broker.prefix}streams:other")
    [again] = await system.take(system.consume(broker, await system.declare(broker, "other")))
    assert ([again.id], again.redelivered) == (sent, 1)
    await system.publish(broker, messages("work", 1))
    assert len(await system.woken(waiting)) == 1


async def test_a_message_that_was_deleted_in_our_hands_is_no_error_and_no_loss_of_others(
    system: System, broker: RedisBroker
) -> None:
    queue = await system.declare(broker, "work")
    stream = f"{broker.prefix}stream:0:work"
    subscription = system.consume(broker, queue)
    await system.publish(broker, messages("work", 1))
    held = await system.take(subscription)
    await broker.link.call("XTRIM", stream, "MAXLEN", 0)
    (await broker.link.line()).abort("is cut")
    sent = await system.publish(broker, messages("work", 1))
    assert ids(await system.take(subscription)) == sent
    other = await system.declare(broker, "other")
    assert not await subscription.settle([Move(held[0], "other", message("work", id="moved"))])
    assert ids(await system.take(system.consume(broker, other))) == ["moved"]


@pytest.mark.parametrize("delay", [0.0, 60.0])
async def test_a_message_that_somebody_deleted_does_not_keep_its_key(
    system: System, broker: RedisBroker, delay: float
) -> None:
    queue = await system.declare(broker, "work", ordered=True)
    await system.publish(broker, [message("work", key="k", delay=delay), message("work", key="l", delay=delay)])
    sent = await system.publish(broker, [message("work", key="k")])
    await broker.link.call("DEL", f"{broker.prefix}stream:0:work")
    *first, _ = sorted(await broker.link.call("HKEYS", f"{broker.prefix}parked:work"))
    for number in first:
        await broker.link.call("HDEL", f"{broker.prefix}parked:work", number)
    subscription = system.consume(broker, queue)
    assert ids(await system.take(subscription)) == sent  # it waited behind
    sent = await system.publish(broker, [message("work", key="l")])
    assert ids(await system.take(subscription)) == sent  # it comes after


async def test_what_is_published_behind_a_message_that_somebody_deleted_takes_its_place(
    system: System, broker: RedisBroker
) -> None:
    await system.declare(broker, "work", ordered=True)
    stream = f"{broker.prefix}stream:0:work"
    await system.publish(broker, [message("work", key="k")])
    await broker.link.call("XTRIM", stream, "MAXLEN", 0)
    await system.publish(broker, [message("work", key="k"), message("work", key="k")])
    assert await broker.link.call("XLEN", stream) == 1
    assert await broker.link.call("HLEN", f"{broker.prefix}parked:work") == 1


async def test_purging_frees_the_keys_of_what_somebody_deleted(system: System, broker: RedisBroker) -> None:
    await system.declare(broker, "work", ordered=True)
    await system.publish(broker, [message("work", key=f"k{number % 50}") for number in range(100)])
    await broker.link.call("DEL", f"{broker.prefix}stream:0:work")
    assert await system.admin(broker).purge("work") == 50
    assert await broker.link.call("EXISTS", f"{broker.prefix}busy:work") == 0
    assert await broker.link.call("EXISTS", f"{broker.prefix}line:4:work:=k1") == 0


async def test_what_has_expired_is_dropped_some_at_a_time(system: System, broker: RedisBroker) -> None:
    queue = await system.declare(broker, "work")
    assert await broker.run(lua.JOIN, "one", 30, "work")
    await system.publish(broker, [message("work", expires_at=time.time() - 1) for _ in range(3500)])
    sent = await system.publish(broker, messages("work", 1))
    said: Any = await broker.run(lua.CLAIM, "one", 0, 10_000, 1000, "work")
    [info] = await broker.link.call("HMGET", f"{broker.prefix}queue:work", "expired")
    assert int(info) < 3500
    assert len(said) == 1
    assert float(said[0]) == 0
    assert ids(await system.take(system.consume(broker, queue))) == sent


async def test_a_batch_of_more_words_than_a_command_may_have_is_stored_whole(
    system: System, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.brokers.redis.broker.MAX_WORDS", 100)
    queue = await system.declare(broker, "work", max_length=20)
    sent = [
        message("work", bytes([number, 0, 255]) * 100, key="ключ", priority=9 - number // 3) for number in range(25)
    ]
    refused = await broker.publish(sent)
    assert [one is None for one in refused] == [True] * 20 + [False] * 5
    taken = await system.drain(system.consume(broker, queue))
    assert [(one.id, one.raw, one.key) for one in taken] == [(one.id, one.body, one.key) for one in sent[:20]]


async def test_a_closed_subscription_is_forgotten(system: System, broker: RedisBroker) -> None:
    queue = await system.declare(broker, "work")
    for _ in range(3):
        subscription = system.consume(broker, queue)
        assert await system.silent(subscription)
        await subscription.close()
    assert not broker._subscriptions
    assert not broker.listening._listeners


async def test_nothing_is_kept_of_consumers_that_were_spared(system: System, broker: RedisBroker) -> None:
    await system.declare(broker, "work")
    assert await broker.run(lua.JOIN, "one", 30, "work")
    await broker.link.call("HSET", f"{broker.prefix}spared", "one", 1)
    await broker.run(lua.LEAVE, "one")
    assert await broker.link.call("EXISTS", f"{broker.prefix}spared") == 0


async def test_a_request_whose_answer_is_lost_is_not_made_again(
    system: System, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = await system.declare(broker, "work")
    inbox = broker.inbox()
    run = Link.run
    error: BrokerError = BrokerUnavailable("the answer is lost")

    async def lossy(link: Link, script: Script, *rest: Any) -> Any:
        answer = await run(link, script, *rest)
        if script is lua.PUBLISH:
            raise error
        return answer

    refusals: list[BrokerError] = []
    monkeypatch.setattr(Link, "run", lossy)
    await inbox.request(message("work"), refusals.append)
    assert refusals == [error]
    error = NotNow("the server is loading")
    with pytest.raises(NotNow):
        await inbox.request(message("work"), refusals.append)
    monkeypatch.undo()
    assert len(refusals) == 1
    assert len(await system.drain(system.consume(broker, queue))) == 2
    await inbox.close()
