"""What exists on the server: queues, their bindings, and the parking queues behind delays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed

from penstock.brokers.amqp.link import Link
from penstock.brokers.base import Queue
from penstock.errors import BrokerRefused, BrokerUnavailable

EXCHANGE = "penstock"
"""A direct exchange: a queue is bound to it by its own name and by its topics."""
PARKING = "penstock.delay"
BROADCAST = "penstock.broadcast"
"""A direct exchange for what only live subscribers get."""

DEFAULT_EXCHANGE = ""
MOST_LEVELS = 10
LONGEST_NAME = 255  # bytes of UTF-8

PARKING_TIMES = [50, *(step * 10**power for power in range(2, 9) for step in (1, 2, 5))]  # milliseconds
_LONGEST_DELAY = 1e10  # seconds; what asks for more waits for ever
_LATER = 100
"""Milliseconds by which a delay may end late rather than go through another parking place."""


def can_be_named(name: str) -> bool:
    """Whether AMQP has room for such a name."""
    return len(name) <= LONGEST_NAME // 4 or len(name.encode(errors="replace")) <= LONGEST_NAME


def check(queue: Queue) -> None:
    """Before anything is made of it.

    :raises BrokerRefused: a name that the server cannot take.
    """
    if not queue.name:
        raise BrokerRefused("a queue needs a name")
    for name in (queue.name, *queue.topics):
        if not can_be_named(name):
            size = len(name.encode(errors="replace"))
            raise BrokerRefused(f"RabbitMQ takes names of up to {LONGEST_NAME} bytes: {name[:40]!r}… has {size}")


def arguments(queue: Queue, queue_type: str) -> dict[str, Any]:
    """The arguments with which a queue is made: quorum, unless it has priorities."""
    made: dict[str, Any] = {}
    if queue.priorities:
        made["x-queue-type"] = "classic"
        made["x-max-priority"] = min(queue.priorities, MOST_LEVELS)
    else:
        made["x-queue-type"] = queue_type
    if queue.max_length is not None:
        made["x-max-length"] = queue.max_length
        made["x-overflow"] = "reject-publish"
    return made


async def ensure_exchange(channel: AbstractChannel, name: str = EXCHANGE) -> None:
    await channel.exchange_declare(name, exchange_type="direct", durable=True)


async def ensure_queue(link: Link, queue: Queue, queue_type: str) -> str | None:
    """Make a queue and its bindings. Where it exists with other arguments they are left as they are, and
    the server's words about it are returned.

    On a channel of its own, for a refused declaration costs the channel.

    :raises BrokerUnavailable, BrokerRefused: as they say.
    """
    complaint: str | None = None
    channel = await link.channel(confirms=False)
    try:
        with link.guard():
            try:
                await channel.queue_declare(queue.name, durable=True, arguments=arguments(queue, queue_type))
            except ChannelPreconditionFailed as error:
                complaint = " ".join(str(error).split())
                channel = await link.channel(confirms=False)
            await ensure_exchange(channel)
            for topic in dict.fromkeys((queue.name, *queue.topics)):
                await channel.queue_bind(queue.name, EXCHANGE, topic)
    finally:
        await link.close_channel(channel)
    return complaint


async def unbind(link: Link, name: str, topics: Sequence[str]) -> bool:
    """Take a queue's bindings to topics away, those that there are; False: there is no such queue."""
    channel = await link.channel(confirms=False)
    try:
        with link.guard():
            try:
                await channel.queue_declare(name, passive=True)
                await ensure_exchange(channel)
                for topic in topics:
                    await channel.queue_unbind(name, EXCHANGE, topic)
            except ChannelNotFoundEntity:
                return False
    finally:
        await link.close_channel(channel)
    return True


async def is_reached(link: Link, name: str) -> bool:
    """Whether a queue is there, and the exchange that its bindings are kept with."""
    channel = await link.channel(confirms=False)
    try:
        with link.guard():
            try:
                await channel.queue_declare(name, passive=True)
                await channel.exchange_declare(EXCHANGE, passive=True)
            except ChannelNotFoundEntity:
                return False
    finally:
        await link.close_channel(channel)
    return True


async def look_for(link: Link, name: str) -> None:
    """:raises BrokerUnavailable: there is no such queue."""
    if await _consumers_of(link, name) is None:
        raise BrokerUnavailable(f"there is no queue {name!r}")


async def is_consumed(link: Link, name: str) -> bool:
    """Whether a queue is there and has a consumer."""
    return bool(await _consumers_of(link, name))


async def _consumers_of(link: Link, name: str) -> int | None:
    channel = await link.channel(confirms=False)
    try:
        with link.guard():
            try:
                return (await channel.queue_declare(name, passive=True)).consumer_count
            except ChannelNotFoundEntity:
                return None
    finally:
        await link.close_channel(channel)


def parking(delay: float) -> tuple[str, int]:
    """The name of the parking place for a delay in seconds, and its milliseconds.

    Parking places have fixed times, from 0.05 s to some days. A message waits in the shortest that ends
    a little after its delay, else in the longest that is not longer, and then once more for what is left.
    """
    left = math.ceil(min(delay, _LONGEST_DELAY) * 1000)
    after = next((step for step in PARKING_TIMES if step >= left), PARKING_TIMES[-1])
    milliseconds = after if after - left <= _LATER else max(step for step in PARKING_TIMES if step <= left)
    return f"{PARKING}.{milliseconds}", milliseconds


async def ensure_parking(channel: AbstractChannel, name: str, milliseconds: int) -> None:
    """A quorum queue that nobody consumes. What has waited in it goes to the queue that its routing key
    names, at least once."""
    await channel.exchange_declare(name, exchange_type="fanout", durable=True)
    await channel.queue_declare(
        name,
        durable=True,
        arguments={
            "x-queue-type": "quorum",
            "x-message-ttl": milliseconds,
            "x-dead-letter-exchange": DEFAULT_EXCHANGE,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )
    await channel.queue_bind(name, name, "")
