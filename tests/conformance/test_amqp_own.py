"""What is RabbitMQ's own: names and headers that it cannot take, foreign messages, channels and lines that end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import aiormq
import pytest
import pytest_asyncio
from pamqp.commands import Basic

from penstock.brokers import registry
from penstock.brokers.amqp import AmqpBroker, topology, wire
from penstock.brokers.amqp.line import Line
from penstock.brokers.base import Ack, Broker, Move, Queue, Release, Settlement
from penstock.errors import (
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    ConfigError,
    PublishError,
    Unroutable,
)
from penstock.testing.conformance.harness import System, acks, ids, message, messages
from penstock.testing.faults import Proxy
from tests.helpers import eventually

Headers = dict[str, Any]


@pytest_asyncio.fixture
async def raw(amqp_url: str) -> AsyncIterator[aiormq.abc.AbstractChannel]:
    """A client of somebody else."""
    async with aiormq.connect(amqp_url) as connection:
        channel = await connection.channel()
        yield channel
        if not channel.is_closed:
            for name in ("theirs", "theirs too"):
                await channel.queue_delete(name)


# -- addresses


async def refusal(url: str, error: type[BrokerError] = BrokerRefused) -> str:
    broker = registry.connect(url)
    with pytest.raises(error) as caught:
        await broker.open()
    await broker.close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_a_wrong_password_is_refused_and_not_shown(amqp_url: str) -> None:
    said = await refusal(amqp_url.replace(":guest@", ":wr%2Fong@"))
    assert "refuses the login" in said
    assert "wr" not in said.split("ACCESS")[0].partition("@")[0].removeprefix("amqp://guest:")


async def test_a_missing_vhost_is_refused(amqp_url: str) -> None:
    assert "there is no vhost 'never/was'" in await refusal(f"{amqp_url}?vhost=never/was")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid"])
async def test_a_server_that_cannot_be_reached_is_unavailable(address: str) -> None:
    assert address in await refusal(f"amqp://{address}/", BrokerUnavailable)


async def test_a_server_that_says_nothing_is_unavailable() -> None:
    with Proxy(5672) as proxy:
        proxy.swallow()
        url = f"amqp://127.0.0.1:{proxy.port}/?timeout=0.2"
        assert "no answer in time" in await refusal(url, BrokerUnavailable)
        await eventually(lambda: proxy.open == 0)


async def test_what_answers_and_speaks_no_amqp_or_no_tls_is_refused(amqp_url: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        broker = AmqpBroker(f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        with pytest.raises(BrokerRefused, match="what listens there does not speak AMQP"):
            await broker.open()
    broker = AmqpBroker("amqps://127.0.0.1:5672/")
    with pytest.raises(BrokerRefused, match="what listens there does not speak TLS"):
        await broker.open()


async def test_a_missing_certificate_file_is_refused() -> None:
    assert "No such file" in await refusal("amqps://127.0.0.1:1/?cafile=/does/not/exist")


@pytest.mark.parametrize("option", ["queue_type=mirrored", "heartbeat=0", "heartbeat=soon", "heartbeet=1"])
def test_an_option_that_makes_no_sense_is_refused(option: str) -> None:
    with pytest.raises(ConfigError):
        AmqpBroker(f"amqp://127.0.0.1/?{option}")


# -- names


@pytest.mark.parametrize(
    "queue",
    [Queue(""), Queue("amq.mine"), Queue("x" * 256), Queue("ö" * 128), Queue("theirs", ("x" * 300,))],
    ids=["empty", "reserved", "long", "long in UTF-8", "long topic"],
)
async def test_a_name_that_the_server_cannot_take_is_refused_and_nothing_is_made(
    system: System, broker: Broker, queue: Queue
) -> None:
    with pytest.raises(BrokerRefused) as caught:
        await broker.declare(queue)
    assert "\n" not in str(caught.value)
    assert list(await system.admin(broker).inspect(["theirs", queue.name])) == []
    await system.declare(broker, "work")  # the connection is as good as before
    await system.publish(broker, messages("work", 1))


async def test_names_as_long_as_the_server_takes_work(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "ö" * 127, topics=("n" * 255,))
    sent = await system.publish(broker, [message("n" * 255), message(queue.name)])
    assert ids(await system.drain(system.consume(broker, queue))) == sent


async def test_nobody_can_be_bound_to_a_name_that_is_too_long(broker: Broker) -> None:
    [outcome] = await broker.publish([message("x" * 256)])
    assert isinstance(outcome, Unroutable)


async def test_an_existing_queue_is_used_as_it_is(
    system: System, broker: Broker, raw: aiormq.abc.AbstractChannel, caplog: pytest.LogCaptureFixture
) -> None:
    await raw.queue_declare("theirs", durable=True, arguments={"x-queue-type": "classic", "x-max-length": 7})
    queue = Queue("theirs", ("news",), priorities=5)
    with caplog.at_level(logging.WARNING, "penstock"):
        await broker.declare(queue)
        await broker.declare(queue)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "queue 'theirs' exists with other arguments and is used as it is"
    ]
    sent = await system.publish(broker, [message("news"), message("theirs", priority=9)])
    assert ids(await system.drain(system.consume(broker, queue))) == sent


# -- what travels


async def travelled(system: System, broker: Broker, headers: Headers) -> Headers:
    queue = await system.declare(broker, "work")
    subscription = system.consume(broker, queue)
    await system.publish(broker, [message("work", headers=headers)])
    [got] = await system.take(subscription)
    await subscription.settle([Release(got, 0.06)])  # by a parking place: the server writes its diary
    [again] = await system.take(subscription)
    assert dict(again.headers) == dict(got.headers)
    await subscription.settle(acks([again]))
    return dict(again.headers)


async def test_headers_that_mean_something_to_the_server_arrive_as_they_are(system: System, broker: Broker) -> None:
    headers: Headers = {"CC": "a", "BCC": "work", "x-death": "d", "x-delivery-count": 7, "x-first-death-queue": "q"}
    headers |= {"n" * 300: 1, "huge": 2**70, "content-type": "t" * 300, "content-encoding": ""}
    assert await travelled(system, broker, headers) == headers


async def test_what_cannot_travel_is_one_error_and_its_batch_mates_are_stored(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    good = messages("work", 3)
    bad = [
        message("work", id="x" * 256),
        message("work", headers={"long": "ü" * 200_000}),
        message("work", headers={"what": object()}),
        message("work", headers={"surrogate": "\ud800"}),
    ]
    outcomes = await broker.publish([good[0], *bad[:2], good[1], *bad[2:], good[2]])
    assert [type(outcome) for outcome in outcomes] == [
        type(None), PublishError, PublishError, type(None), PublishError, PublishError, type(None),
    ]  # fmt: skip
    assert all("\n" not in str(outcome) and len(str(outcome)) < 300 for outcome in outcomes)
    assert ids(await system.drain(system.consume(broker, queue))) == ids(good)


async def test_dead_letters_have_room_for_what_the_engine_adds(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    await system.publish(broker, [message("work", headers={"long": "x" * 60_000})])
    subscription = system.consume(broker, queue)
    [held] = await system.take(subscription)
    letter = message("work", id=held.id, headers={**held.headers, "penstock-dead": "x" * 60_000})
    await subscription.settle([Move(held, "work", letter)])
    [got] = await system.take(subscription)
    assert dict(got.headers) == dict(letter.headers)


async def test_a_message_that_costs_the_channel_is_found_and_its_batch_mates_are_stored(
    system: System, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one over the server's `max_message_size` does."""
    to_properties = wire.to_properties

    def poisoned(outgoing: Any, *args: Any, **options: Any) -> Basic.Properties:
        properties = to_properties(outgoing, *args, **options)
        if outgoing.body == b"bad":
            assert properties.headers is not None
            properties.headers["CC"] = "not a list"
        return properties

    monkeypatch.setattr(wire, "to_properties", poisoned)
    queue = await system.declare(broker, "work")
    batches = [[*messages("work", 5), message("work", b"bad"), *messages("work", 5)], messages("work", 1)]
    outcomes, alone = await asyncio.gather(*(broker.publish(batch) for batch in batches))
    assert [outcome is None for outcome in outcomes] == [True] * 5 + [False] + [True] * 5
    assert "unacceptable_type_in_header" in str(outcomes[5])
    assert list(alone) == [None]  # who published beside it at that moment is not to blame
    good = [one for batch in batches for one in batch if one.body != b"bad"]
    assert {*ids(await system.drain(system.consume(broker, queue)))} == {*ids(good)}


async def test_alike_messages_on_their_way_together_have_each_their_own_outcome(system: System, broker: Broker) -> None:
    await system.declare(broker, "work")
    batch = [message(name, id="same") for name in ("nowhere", "work", "nobody", "work")]
    both = await asyncio.gather(broker.publish(batch), broker.publish(batch))
    for outcomes in both:
        assert [type(outcome) for outcome in outcomes] == [Unroutable, type(None), Unroutable, type(None)]
    assert len(await system.drain(system.consume(broker, Queue("work")))) == 4


# -- messages and queues of somebody else


async def test_a_queue_of_somebody_else_can_be_published_to_by_name(
    system: System, broker: Broker, raw: aiormq.abc.AbstractChannel
) -> None:
    await raw.queue_declare("theirs")
    sent = await system.publish(broker, [message("theirs", b"x"), message("theirs", b"y")])
    found = [await raw.basic_get("theirs") for _ in range(2)]
    assert [(one.header.properties.message_id, one.body) for one in found] == [(sent[0], b"x"), (sent[1], b"y")]


async def test_foreign_messages_become_proper_deliveries(
    system: System, broker: Broker, raw: aiormq.abc.AbstractChannel
) -> None:
    queue = await system.declare(broker, "work")
    at = datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)
    foreign = [
        (b"", None),
        (b"\x00\xff", Basic.Properties(content_type="image/png", priority=3)),
        (b"{}", Basic.Properties(headers={"n": 1, "list": [1], "table": {"a": "b"}, "at": at}, timestamp=at)),
        (b"x", Basic.Properties(headers={"penstock-at": 7, "penstock-topic": 3, "penstock-more": "{"})),
    ]
    for body, properties in foreign:
        await raw.basic_publish(body, routing_key="work", properties=properties)
    subscription = system.consume(broker, queue)
    one, two, three, four = await system.take(subscription, 4)
    assert (one.raw, dict(one.headers), one.topic, one.key, one.redelivered) == (b"", {}, "work", None, 0)
    assert one.id
    assert abs(one.enqueued_at - time.time()) < 60
    assert (two.raw, dict(two.headers), two.priority) == (b"\x00\xff", {"content-type": "image/png"}, 3)
    assert (three.enqueued_at, three.headers["table"]) == (at.timestamp(), {"a": "b"})
    assert (four.topic, dict(four.headers)) == ("work", {})
    await subscription.settle([Release(delivery) for delivery in (one, two, three, four)])
    again = await system.take(subscription, 4)
    assert ids(again) == ids([one, two, three, four])  # from now on they keep their ids
    assert [dict(delivery.headers) for delivery in again] == [dict(d.headers) for d in (one, two, three, four)]


# -- delays and expiry


@pytest.mark.parametrize(
    ("delay", "place"),
    [
        (0.01, 50),
        (0.05, 50),
        (0.06, 100),
        (1, 1000),
        (1.2, 1000),
        (89.95, 50_000),
        (99.95, 100_000),
        (10**9, 500_000_000),
    ],
)
def test_a_delay_waits_in_a_place_that_ends_little_later_if_at_all(delay: float, place: int) -> None:
    assert topology.parking(delay) == (f"penstock.delay.{place}", place)


async def test_a_retry_of_ninety_seconds_is_parked(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 1))
    subscription = system.consume(broker, queue)
    [held] = await system.take(subscription)
    await subscription.settle([Move(held, "work", message("work", id=held.id, delay=90))])
    seen = await system.admin(broker).inspect(["work", "penstock.delay.50000"])
    assert [(info.name, info.ready) for info in seen] == [("penstock.delay.50000", 1), ("work", 0)]


@pytest.mark.parametrize("delay", [0.01, 0.23, 1.0])
async def test_a_delay_is_kept_within_its_tolerance(system: System, broker: Broker, delay: float) -> None:
    queue = await system.declare(broker, "work")
    subscription = system.consume(broker, queue)
    await subscription.receive(1, 0)
    began = time.monotonic()
    sent = await system.publish(broker, [message("work", delay=delay)])
    assert ids(await system.take(subscription)) == sent
    assert delay - 0.01 <= time.monotonic() - began < delay + 1.0


async def test_a_delayed_message_for_nobody_is_unroutable(broker: Broker) -> None:
    [outcome] = await broker.publish([message("nowhere", delay=1.0)])
    assert isinstance(outcome, Unroutable)


async def test_what_expires_in_the_hands_of_the_driver_is_not_handed_out(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    consumer = system.consume(broker, queue)
    await consumer.receive(1, 0)
    gone = time.time() + 0.2
    await system.publish(broker, [message("work", expires_at=gone)])
    await eventually(lambda: time.time() > gone)
    assert await system.silent(consumer)
    assert [info.ready for info in await system.admin(broker).inspect()] == [0]


async def test_what_was_in_hand_and_is_given_back_expires_no_more(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    expires_at = time.time() + 0.3
    sent = await system.publish(broker, [message("work", expires_at=expires_at)])
    consumer = system.consume(broker, queue, ahead=False)
    await consumer.settle([Release(one) for one in await system.take(consumer)])
    await eventually(lambda: time.time() > expires_at + 0.1)
    [again] = await system.take(consumer)
    assert ([again.id], again.expires_at) == (sent, expires_at)


# -- settling


async def test_settling_again_after_a_failure_repeats_nothing(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    sent = await system.publish(broker, messages("work", 4))
    consumer = system.consume(broker, queue)
    one, two, three, four = await system.take(consumer, 4)
    items: list[Settlement] = [
        Ack(one),
        Move(two, "work.dead", message("work", id=two.id)),
        Move(three, "later", message("work", id=three.id)),
    ]
    await system.declare(broker, "work.dead")
    with pytest.raises(BrokerUnavailable, match="later"):
        await consumer.settle(items)
    later = await system.declare(broker, "later")
    assert list(await consumer.settle(items)) == []
    assert sorted(map(id, await consumer.settle([*items, Ack(four)]))) == sorted(map(id, (one, two, three)))
    assert ids(await system.drain(system.consume(broker, later))) == [three.id]
    assert ids(await system.drain(system.consume(broker, Queue("work.dead")))) == [two.id]
    assert await system.silent(consumer)
    assert len(sent) == 4


async def test_a_loss_is_told_of_a_classic_queue_too_once(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work", priorities=5)
    await system.publish(broker, messages("work", 1))
    for _ in range(2):
        other = await system.connect()
        held = await system.take(system.consume(other, queue))
        await sever(other)
        assert len(held) == 1
    [got] = await system.take(system.consume(broker, queue))
    assert got.redelivered == 1  # a classic queue marks a redelivery, and counts none


async def sever(broker: Broker) -> None:
    """End a broker's connections from below, as a reset does."""
    assert isinstance(broker, AmqpBroker)
    for link in (broker.consuming, broker.publishing):
        if link._connection is not None:
            await link._connection.close(ConnectionResetError("severed"))


@pytest.mark.parametrize("where", ["id", "value", "name"])
async def test_text_that_is_no_utf_8_ends_no_connection(amqp_url: str, where: str) -> None:
    given = {
        "id": Basic.Properties(message_id="ZZZZ"),
        "value": Basic.Properties(message_id="x", headers={"a": "ZZZZ"}),
        "name": Basic.Properties(message_id="x", headers={"ZZZZ": "a"}),
    }
    broker = registry.connect(amqp_url)
    await broker.open()
    await broker.declare(Queue("theirs"))
    subscription = broker.subscribe([Queue("theirs")], prefetch=10, lease=5, on_lost=lambda lost: None)
    async with aiormq.connect(amqp_url) as connection:
        channel = await connection.channel(publisher_confirms=False)
        line = Line(channel)  # type: ignore[arg-type]  # the driver promises less than it gives
        frames = line.marshal("", "theirs", given[where], b"1", mandatory=False)
        await line.write(frames.replace(b"ZZZZ", b"\xff\xfe\xff\xff"))
        (delivery,) = await subscription.receive(10, 10)
        assert delivery.raw == b"1"
        assert (await subscription.settle([Ack(delivery)])) == []
        await broker.publish([message("theirs")])
        assert len(await subscription.receive(10, 10)) == 1
        await broker.close()
        await channel.queue_delete("theirs")
