"""Lines, channels and queues that end under a consumer on RabbitMQ: all of it goes on by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from penstock.brokers.amqp import AmqpBroker, subscription
from penstock.brokers.base import Ack, Broker, Queue
from penstock.errors import BrokerUnavailable, Unroutable
from penstock.message import Delivery
from penstock.testing.conformance.harness import System, acks, ids, message, messages
from penstock.testing.faults import Proxy
from tests.helpers import eventually
from tests.servers import delete_queues


def tasks() -> int:
    return len(asyncio.all_tasks())


async def test_after_a_cut_everything_goes_on_and_nothing_is_left_behind(amqp_url: str) -> None:
    with Proxy(5672) as proxy:
        url = amqp_url.replace(":5672", f":{proxy.port}")
        broker = AmqpBroker(f"{url}?heartbeat=1")
        lost: list[Delivery] = []

        def on_lost(deliveries: Sequence[Delivery]) -> None:
            assert all(one.lost for one in deliveries)
            lost.extend(deliveries)

        await broker.declare(Queue("work"))
        consumer = broker.subscribe([Queue("work")], prefetch=10, lease=30, on_lost=on_lost)
        before = 0
        for turn in range(50):
            sent = await insist(broker, messages("work", 1))
            held: list[Delivery] = []
            while not held:
                try:
                    held = await consumer.receive(1, 5)
                except BrokerUnavailable:
                    await asyncio.sleep(0.01)
            assert ids(held) == sent
            if turn % 2:
                proxy.cut()
                await eventually(partial(getattr, held[0], "lost"))
                assert lost == held
                assert not consumer.consuming
                assert list(await consumer.settle(acks(held))) == held
                lost.clear()
                held = []
                while not held:
                    try:
                        held = await consumer.receive(1, 5)
                    except BrokerUnavailable:
                        await asyncio.sleep(0.01)
                assert (ids(held), held[0].redelivered) == (sent, 1)
            assert list(await consumer.settle(acks(held))) == []
            if turn == 5:
                before = tasks()
        await eventually(lambda: tasks() <= before, f"{before} tasks as before")
        await eventually(lambda: proxy.open <= 2)
        await broker.close()
        await eventually(lambda: proxy.open == 0)
    assert lost == []


async def insist(broker: Broker, batch: Sequence[Any]) -> list[str]:
    """Publish; while the line is found dead, again."""
    async with asyncio.timeout(10):
        while True:
            try:
                assert list(await broker.publish(batch)) == [None] * len(batch)
                return ids(batch)
            except BrokerUnavailable:
                await asyncio.sleep(0.01)


async def test_a_publisher_whose_connection_is_closed_is_not_cancelled(amqp_url: str) -> None:
    with Proxy(5672) as proxy:
        broker = AmqpBroker(f"{amqp_url.replace(':5672', f':{proxy.port}')}?heartbeat=1")
        await broker.declare(Queue("work"))
        consumer = broker.subscribe([Queue("work")], prefetch=1, lease=30, on_lost=lambda lost: None, ahead=False)
        await consumer.receive(1, 0)
        proxy.swallow()  # heartbeats find it dead; the driver then cancels whoever waits
        publishing = asyncio.create_task(broker.publish(messages("work", 1)))
        fetching = asyncio.create_task(consumer.receive(1, 20))
        declaring = asyncio.create_task(broker.declare(Queue("work", ("news",))))
        for task in (publishing, fetching, declaring):
            with pytest.raises(BrokerUnavailable):
                await asyncio.wait_for(task, 20)
        proxy.restore()
        await insist(broker, messages("work", 1))
        await broker.close()


async def test_closing_takes_bounded_time_on_a_dead_line(amqp_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription, "CLOSE_TIMEOUT", 0.5)
    monkeypatch.setattr("penstock.brokers.amqp.link.CLOSE_TIMEOUT", 0.5)
    with Proxy(5672) as proxy:
        broker = AmqpBroker(amqp_url.replace(":5672", f":{proxy.port}"))
        await broker.declare(Queue("work"))
        await insist(broker, messages("work", 3))
        consumer = broker.subscribe([Queue("work")], prefetch=10, lease=30, on_lost=lambda lost: None)
        held = await consumer.receive(3, 5)
        proxy.swallow()
        async with asyncio.timeout(5):
            await broker.close()
        assert list(await consumer.settle(acks(held))) == held


async def test_a_queue_that_is_deleted_is_made_and_consumed_again(
    system: System, broker: Broker, amqp_url: str
) -> None:
    queues = [await system.declare(broker, name) for name in ("work", "other")]
    consumer = system.consume(broker, *queues)
    await system.publish(broker, messages("other", 1))
    held = await system.take(consumer)
    receiving = await system.blocked(consumer)
    await delete_queues(amqp_url, ["work"])
    async with asyncio.timeout(10):
        sent: list[str] = []
        while not sent:
            outcome = message("work")
            sent = [] if (await broker.publish([outcome]))[0] else [outcome.id]
        assert ids(await receiving) == sent
    assert list(await consumer.settle(acks(held))) == []  # what was held of the other queue stays ours
    assert consumer.consuming


async def test_a_queue_that_was_unbound_is_not_bound_again_by_whoever_loses_a_channel(
    system: System, broker: Broker
) -> None:
    queue = await system.declare(broker, "work", topics=("news", "olds"))
    consumer = system.consume(broker, queue)
    await system.publish(broker, messages("news", 1))
    assert not await consumer.settle(acks(await system.take(consumer)))
    await system.admin(await system.connect()).unbind("work", ["news"])
    channel = consumer._channel  # type: ignore[attr-defined]
    await channel.basic_ack(4711)  # a tag that it never gave out
    await eventually(lambda: consumer._channel is not channel)  # type: ignore[attr-defined]
    sent = await system.publish(broker, messages("olds", 1))
    assert ids(await system.take(consumer)) == sent
    assert isinstance((await broker.publish(messages("news", 1)))[0], Unroutable)


async def test_a_queue_that_is_made_again_has_the_bindings_of_all_who_declared_it(
    system: System, broker: Broker, amqp_url: str
) -> None:
    first, second = broker, await system.connect()
    consumers, receiving = [], []
    for one, topic in ((first, "news"), (second, "olds")):
        consumers.append(system.consume(one, await system.declare(one, "work", topics=(topic,))))
        receiving.append(await system.blocked(consumers[-1]))
    await delete_queues(amqp_url, ["work"])
    async with asyncio.timeout(10):
        while any(await broker.publish([message("news"), message("olds")])):
            await asyncio.sleep(0.05)
    await asyncio.gather(*(consumer.close() for consumer in consumers))
    await asyncio.gather(*receiving)


async def test_a_channel_that_the_server_closes_is_made_again(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    lost: list[Delivery] = []
    consumer = system.consume(broker, queue, on_lost=lost.extend)
    sent = await system.publish(broker, messages("work", 1))
    held = await system.take(consumer)
    channel = consumer._channel  # type: ignore[attr-defined]
    await channel.basic_ack(4711)  # a tag that it never gave out
    await eventually(lambda: lost == held)
    [again] = await system.take(consumer)
    assert ([again.id], again.redelivered) == (sent, 1)
    assert list(await consumer.settle([Ack(held[0]), Ack(again)])) == held


async def test_a_broker_can_be_used_again_after_closing(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    await broker.close()
    sent = await system.publish(broker, messages("work", 1))
    assert ids(await system.drain(system.consume(broker, queue))) == sent


async def test_a_consumer_that_the_server_has_forgotten_is_noticed(
    system: System, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As happens to one who joins a queue at the moment of its deletion; the server says nothing."""
    monkeypatch.setattr(subscription, "VERIFY", 0.2)
    queue = await system.declare(broker, "work")
    consumer = system.consume(broker, queue)
    receiving = await system.blocked(consumer)
    channel = consumer._channel  # type: ignore[attr-defined]
    for tag in list(channel.consumers):
        await channel.basic_cancel(tag)
    sent = await system.publish(broker, messages("work", 1))
    async with asyncio.timeout(10):
        assert ids(await receiving) == sent


async def test_what_cannot_be_parked_now_stays_in_hand_and_is_parked_later(
    system: System, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = await system.declare(broker, "work")
    assert isinstance(broker, AmqpBroker)
    send, failures = broker.publisher.send, 2

    async def failing(letters: Sequence[Any]) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise BrokerUnavailable("short of memory")
        return await send(letters)

    monkeypatch.setattr(broker.publisher, "send", failing)
    monkeypatch.setattr(subscription, "LOOK", 0.05)
    lost: list[Delivery] = []
    consumer = system.consume(broker, queue, on_lost=lost.extend)
    held = await system.publish(broker, messages("work", 1))
    taken = await system.take(consumer)
    sent = await system.publish(broker, [message("work", delay=0.5)])
    assert ids(await system.take(consumer)) == sent
    assert list(await consumer.settle(acks(taken))) == []
    assert (ids(taken), lost) == (held, [])
    assert failures < 0
