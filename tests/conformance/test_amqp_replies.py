"""Requests and replies on RabbitMQ: what is its own, and what happens when lines, channels and queues end."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import aiormq
import pytest
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp.commands import Basic

from penstock.brokers.amqp import AmqpBroker, inbox, requests, wire
from penstock.brokers.amqp import line as lines
from penstock.brokers.amqp.inbox import AmqpInbox
from penstock.brokers.base import Broker, Queue
from penstock.errors import BrokerError, BrokerUnavailable, PublishError, QueueFull, Unroutable
from penstock.message import Outgoing
from penstock.testing.conformance.harness import System, acks, ids, message
from penstock.testing.conformance.replies import answer, ask, hear, serve
from penstock.testing.faults import Proxy
from tests.helpers import eventually
from tests.servers import delete_queues


def tasks() -> int:
    return len(asyncio.all_tasks())


def begun(box: AmqpInbox, life: int) -> bool:
    return box.life > life


def own(broker: Broker) -> AmqpInbox:
    found = broker.inbox()
    assert isinstance(found, AmqpInbox)
    return found


@asynccontextmanager
async def raw(url: str) -> AsyncIterator[Any]:
    """A channel of somebody who does not use Penstock."""
    async with aiormq.connect(url) as connection:
        yield await connection.channel()


async def insist(inbox: AmqpInbox, one: Outgoing) -> list[str]:
    """Request; while the line is found dead, again."""
    async with asyncio.timeout(10):
        while True:
            told: list[BrokerError] = []
            try:
                await inbox.request(one, told.append)
                return ids([one])
            except BrokerUnavailable:
                await asyncio.sleep(0.01)


# -- ends of lines, channels and queues


async def test_after_a_cut_a_new_life_begins_and_nothing_is_left_behind(
    system: System, broker: Broker, amqp_url: str
) -> None:
    consumer = system.consume(broker, await system.declare(broker, "work"))
    with Proxy(5672) as proxy:
        cut = AmqpBroker(f"{amqp_url.replace(':5672', f':{proxy.port}')}?heartbeat=1")
        box = own(cut)
        before = 0
        for turn in range(20):
            sent = await insist(box, message("work"))
            await serve(system, broker, consumer)
            assert ids(await hear(system, box)) == sent
            life, told = box.life, list[BrokerError]()
            await box.request(message("work"), told.append)
            [held] = await system.take(consumer)
            receiving = asyncio.create_task(box.receive(20))
            await asyncio.sleep(0)
            proxy.cut()
            async with asyncio.timeout(5):
                assert await receiving == []  # long before its wait is over
            assert box.life > life
            await eventually(partial(len, told))
            assert [type(error) for error in told] == [BrokerUnavailable]
            await broker.reply([answer(held)])  # to nobody
            await consumer.settle(acks([held]))
            if turn == 5:
                before = tasks()
        await eventually(lambda: tasks() <= before, f"{before} tasks as before")
        await cut.close()
        await eventually(lambda: proxy.open == 0)


async def test_what_is_known_to_be_taken_is_not_refused_later(
    system: System, broker: Broker, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "LOOK", 0.05)
    await system.declare(broker, "work")
    with Proxy(5672) as proxy:
        cut = AmqpBroker(amqp_url.replace(":5672", f":{proxy.port}"))
        box = own(cut)
        told: list[BrokerError] = []
        for _ in range(10):
            await box.request(message("work"), told.append)
        [asking] = box._requests.values()
        await eventually(lambda: not asking._asked and not asking._before and asking._looking is None)
        life = box.life
        proxy.cut()
        await eventually(lambda: box.life > life)
        assert told == []
        await cut.close()


async def test_a_dead_line_is_found_by_heartbeats(system: System, broker: Broker, amqp_url: str) -> None:
    await system.declare(broker, "work")
    with Proxy(5672) as proxy:
        cut = AmqpBroker(f"{amqp_url.replace(':5672', f':{proxy.port}')}?heartbeat=1")
        box = own(cut)
        await ask(box, message("work"))
        told: list[BrokerError] = []
        proxy.swallow()
        await box.request(message("work"), told.append)
        life = box.life
        assert await box.receive(20) == []
        assert box.life > life
        await eventually(lambda: told)
        proxy.restore()
        await insist(box, message("work"))
        await cut.close()


async def test_a_line_that_takes_nothing_is_an_error_and_not_a_full_memory(
    system: System, broker: Broker, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "TIMEOUT", 0.3)
    await system.declare(broker, "work")
    with Proxy(5672) as proxy:
        slow = AmqpBroker(f"{amqp_url.replace(':5672', f':{proxy.port}')}?heartbeat=600")
        box = own(slow)
        await ask(box, message("work"))
        proxy.throttle(1)
        body = b"x" * 100_000

        async def go_on() -> None:
            for _ in range(1000):
                await box.request(message("work", body), lambda error: None)

        with pytest.raises(BrokerUnavailable, match="no answer in time"):
            await go_on()
        proxy.restore()
        proxy.cut()
        await slow.close()


async def test_what_is_written_goes_out_in_the_order_in_which_it_was_written() -> None:
    """The server counts the messages of a channel, and so do we."""
    queue: asyncio.Queue[Any] = asyncio.Queue(2)
    fake = SimpleNamespace(max_content_size=1000, is_closed=False, _close_exception=None, write_queue=queue)
    line, written, sent = lines.Line(cast(Channel, fake)), b"", b""

    async def write(data: bytes) -> None:
        nonlocal written
        await line.write(data)
        written += data

    queue.put_nowait(None)
    queue.put_nowait(None)
    first = asyncio.create_task(write(b"a"))
    await asyncio.sleep(0)
    queue.get_nowait()
    await write(b"b")  # before the one that was waiting comes to know of the room
    queue.get_nowait()
    await first
    await write(b"c")
    while not queue.empty():
        sent += queue.get_nowait().payload
    assert sent == written == b"bac"


async def test_a_channel_that_the_server_closes_ends_a_life_and_is_made_again(system: System, broker: Broker) -> None:
    consumer = system.consume(broker, await system.declare(broker, "work"))
    box = own(broker)
    for turn in range(12):
        sent = await ask(box, message("work"))
        await serve(system, broker, consumer)
        assert ids(await hear(system, box)) == sent
        [asking] = box._requests.values()
        connection, life = asking._line.channel.connection, box.life
        await asking._line.channel.basic_ack(4711)  # a tag that the server never gave out
        told: list[BrokerError] = []
        for _ in range(turn):  # what is written for the closed channel must not cost the connection
            await box.request(message("work"), told.append)
            await asyncio.sleep(0)
        await eventually(partial(begun, box, life))
        assert not connection.is_closed
        assert all(type(error) is BrokerUnavailable for error in told)
        assert len(told) + len(await system.take(consumer, turn - len(told))) == turn


async def test_no_reply_consumer_is_a_life_that_ended(system: System, broker: Broker) -> None:
    await system.declare(broker, "work")
    box = own(broker)
    await ask(box, message("work"))
    [asking] = box._requests.values()
    life = box.life
    await asking._cancelled(Basic.Cancel("tag"))
    await eventually(lambda: box.life > life)
    await ask(box, message("work"))


async def test_a_deleted_broadcast_queue_is_made_again_at_once(
    system: System, broker: Broker, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "CHECK", 60.0)
    box = own(broker)
    await box.listen(frozenset({"news"}))
    receiving = asyncio.create_task(box.receive(30))
    queue = box._queue
    assert box._channel is not None
    await box._channel.queue_delete(queue)
    await eventually(lambda: box._queue != queue and box._bound)
    await broker.broadcast(sent := message("news"))
    assert ids(await asyncio.wait_for(receiving, 5)) == [sent.id]


async def test_a_cut_under_a_broadcast_inbox_is_noticed_at_once(
    amqp_url: str, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "CHECK", 60.0)
    with Proxy(5672) as proxy:
        cut = AmqpBroker(amqp_url.replace(":5672", f":{proxy.port}"))
        box = own(cut)
        await box.listen(frozenset({"news"}))
        receiving = asyncio.create_task(box.receive(30))
        await asyncio.sleep(0)
        queue = box._queue
        proxy.cut()
        await eventually(lambda: box._queue != queue and box._bound)
        await broker.broadcast(sent := message("news"))
        assert ids(await asyncio.wait_for(receiving, 5)) == [sent.id]
        await cut.close()


# -- refused


async def test_a_queue_that_somebody_else_made_is_found_and_remembered(
    system: System, broker: Broker, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[str] = []
    on_return = requests.Requests._on_return

    async def note(self: requests.Requests, frame: Basic.Return) -> None:
        returned.append(str(frame.exchange))
        await on_return(self, frame)

    monkeypatch.setattr(requests.Requests, "_on_return", note)
    async with raw(amqp_url) as channel:
        await channel.queue_declare("theirs", durable=True)
    box = own(broker)
    consumer = system.consume(broker, Queue("theirs"))
    sent: list[str] = []
    for _ in range(5):
        sent += await ask(box, message("theirs", headers={"a": 1, "b": 0.5, "c": None, "d": b"\x00"}))
        [request] = await serve(system, broker, consumer)
        assert request.headers == {"a": 1, "b": 0.5, "c": None, "d": b"\x00"}
    assert ids(await hear(system, box, 5)) == sent
    assert returned == ["penstock"]
    await delete_queues(amqp_url, ["theirs"])
    for _ in range(2):
        told: list[BrokerError] = []
        await box.request(message("theirs"), told.append)
        await eventually(partial(len, told))
        assert [type(error) for error in told] == [Unroutable]
    assert returned == ["penstock", "", "penstock", "penstock", ""]


async def test_declaring_makes_the_exchange_the_way_again(system: System, broker: Broker, amqp_url: str) -> None:
    async with raw(amqp_url) as channel:
        await channel.queue_declare("theirs", durable=True)
    box = own(broker)
    await ask(box, message("theirs"))
    await serve(system, broker, system.consume(broker, Queue("theirs")))
    await hear(system, box)
    other = await system.declare(broker, "other", topics=("theirs",))
    await ask(box, message("theirs"))
    assert len(await system.take(system.consume(broker, other))) == 1
    await delete_queues(amqp_url, ["theirs"])


async def test_the_way_is_remembered_for_a_while_only() -> None:
    ways = requests.Ways()
    assert (ways.to("a"), ways.not_by("penstock", "a"), ways.to("a")) == ("penstock", "", "")
    ways._by_default["a"] = 0.0
    assert ways.to("a") == "penstock"
    assert not ways._by_default


async def test_what_cannot_be_written_is_refused_alone(system: System, broker: Broker) -> None:
    consumer = system.consume(broker, await system.declare(broker, "work"))
    box = own(broker)
    told: list[BrokerError] = []
    await box.request(message("work", id="i" * 256), told.append)
    await box.request(message("work", headers={"h": "x" * 70_000}), told.append)
    await box.request(message("work", headers={"h": object()}), told.append)
    assert [type(error) for error in told] == [PublishError] * 3
    await box.request(message("w" * 256), told.append)
    assert isinstance(told[3], Unroutable)
    sent = await ask(box, message("work"))
    await serve(system, broker, consumer)
    assert ids(await hear(system, box)) == sent
    assert len(told) == 4


async def test_nobody_asks_for_an_answer_to_a_channel_that_has_none(system: System, broker: Broker) -> None:
    await system.declare(broker, "work")
    good, bad = message("work"), message("work", reply_to=wire.REPLY_TO)
    outcomes = await broker.publish([good, bad])
    assert outcomes[0] is None
    assert type(outcomes[1]) is PublishError


async def test_only_a_queue_that_may_be_full_is_asked_for_confirmations(system: System, broker: Broker) -> None:
    await system.declare(broker, "work")
    small = await system.declare(broker, "small", topics=("tiny",), max_length=1)
    box = own(broker)
    await system.fill(broker, small)
    told: list[BrokerError] = []
    await box.request(message("work"), told.append)
    assert list(box._requests) == [False]
    for topic in ("small", "tiny"):
        await box.request(message(topic), told.append)
    await eventually(lambda: len(told) == 2)
    assert isinstance(told[0], QueueFull)
    assert isinstance(told[1], PublishError)
    taken = system.consume(broker, small)
    await system.drain(taken)
    sent = await ask(box, *[message("tiny") for _ in range(3)])
    assert sorted(ids(await system.take(taken, len(sent)))) == sorted(sent)
    asking = box._requests[True]
    await eventually(lambda: not (asking._by_tag or asking._asked))


async def test_a_callback_that_fails_disturbs_nobody(
    system: System, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = system.consume(broker, await system.declare(broker, "work"))
    box = own(broker)

    def fails(error: BrokerError) -> None:
        raise RuntimeError("not now")

    life = box.life
    await box.request(message("nowhere"), fails)
    await eventually(lambda: "could not be told" in caplog.text)
    sent = await ask(box, message("work"))
    await serve(system, broker, consumer)
    assert ids(await hear(system, box)) == sent
    assert box.life == life


# -- addresses


def poison(address: str) -> list[str]:
    """Addresses on which RabbitMQ 3.10 ends the connection, made of a good one."""
    process, key = address.removeprefix(f"{wire.REPLY_TO}.").split(".")
    tail = base64.b64decode(process)[-12:]
    made = [b"\x83Xv\x00\x07reply@1" + tail, b"\x83Xw\x05a@b.c" + tail, b"\x83a\x01" + tail, tail]
    return [f"{wire.REPLY_TO}.{base64.b64encode(one).decode()}.{key}" for one in made]


async def test_an_address_that_the_server_chokes_on_costs_nobody_a_reply(system: System, broker: Broker) -> None:
    assert isinstance(broker, AmqpBroker)
    consumer = system.consume(broker, await system.declare(broker, "work"))
    box = own(await system.connect())
    sent = await ask(box, message("work"), message("work"))
    one, two = await system.take(consumer, 2)
    await broker.open()
    connection = broker.publishing._connection
    bad = [message(address) for address in poison(str(one.reply_to))]
    bad += [message(wire.REPLY_TO), *(message(f"{wire.REPLY_TO}.{end}") for end in ("", "x", "!!!.k", "é.k", ".."))]
    for replies in ([*bad, answer(one)], [answer(two), *bad]):
        await broker.reply(replies)
    assert ids(await hear(system, box, 2)) == sent
    assert broker.publishing._connection is connection
    assert broker.publishing.connected


async def test_the_first_reply_to_a_node_is_sent_once(system: System, broker: Broker) -> None:
    consumer = system.consume(broker, await system.declare(broker, "work"))
    boxes = [own(await system.connect()) for _ in range(5)]
    for box in boxes:
        await ask(box, message("work"))
    requests = await system.take(consumer, 5)
    await asyncio.gather(*(broker.reply([answer(one)]) for one in requests))
    for box in boxes:
        await hear(system, box)
        assert await box.receive(system.harness.quiet) == []


async def test_after_a_cut_replies_go_on(system: System, broker: Broker, amqp_url: str) -> None:
    consumer = system.consume(broker, await system.declare(broker, "work"))
    box = own(broker)
    with Proxy(5672) as proxy:
        cut = AmqpBroker(amqp_url.replace(":5672", f":{proxy.port}"))
        for _ in range(10):
            sent = await ask(box, message("work"))
            [request] = await system.take(consumer)
            async with asyncio.timeout(10):
                heard: list[Any] = []
                while not heard:
                    try:
                        await cut.reply([answer(request)])
                        heard = await box.receive(0.5)
                    except BrokerUnavailable:
                        await asyncio.sleep(0.01)
            assert ids(heard) == sent
            await consumer.settle(acks([request]))
            proxy.cut()
        await cut.close()


async def test_a_reply_that_cannot_be_written_costs_no_other(
    system: System, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = system.consume(broker, await system.declare(broker, "work"))
    box = own(broker)
    sent = await ask(box, message("work"))
    [request] = await system.take(consumer)
    large = answer(request, headers={"h": "x" * 70_000})
    long = message(str(request.reply_to), id="i" * 256)
    await broker.reply([large, long, answer(request)])
    assert ids(await hear(system, box)) == sent
    assert caplog.text.count("is not sent") == 2


# -- others


async def test_a_server_that_is_not_ours_answers_by_the_correlation_id(
    system: System, broker: Broker, amqp_url: str
) -> None:
    box = own(broker)
    async with raw(amqp_url) as channel:
        queue = (await channel.queue_declare("", exclusive=True)).queue

        async def serve(asked: DeliveredMessage) -> None:
            said = asked.header.properties
            properties = Basic.Properties(correlation_id=said.correlation_id)
            await channel.basic_publish(asked.body[::-1], routing_key=said.reply_to, properties=properties)

        await channel.basic_consume(queue, serve, no_ack=True)
        sent = await ask(box, message(queue, b"abc"))
        [reply] = await hear(system, box)
        assert (ids([reply]), reply.raw) == (sent, b"cba")


async def test_a_caller_that_is_not_ours_gets_its_answer_where_it_waits(
    system: System, broker: Broker, amqp_url: str
) -> None:
    consumer = system.consume(broker, await system.declare(broker, "work"))
    answers: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
    async with raw(amqp_url) as channel:
        queue = (await channel.queue_declare("", exclusive=True)).queue
        await channel.basic_consume(queue, answers.put, no_ack=True)
        properties = Basic.Properties(reply_to=queue, correlation_id="theirs")
        await channel.basic_publish(b"abc", routing_key="work", properties=properties)
        [request] = await serve(system, broker, consumer)
        assert (request.id, request.reply_to) == ("theirs", queue)
        reply = await asyncio.wait_for(answers.get(), 5)
        assert (reply.header.properties.correlation_id, reply.body) == ("theirs", b"abc")
