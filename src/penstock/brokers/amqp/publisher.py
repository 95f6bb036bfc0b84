"""`Publisher`: confirmed publishing on one channel, with an outcome for every message."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from aiormq import exceptions
from aiormq.channel import Channel

from penstock.brokers.amqp import topology, wire
from penstock.brokers.amqp.link import BROKEN, Link, cancelled_by_caller
from penstock.brokers.base import Queue
from penstock.errors import BrokerError, BrokerUnavailable, PublishError, QueueFull, Unroutable
from penstock.message import Outgoing

TOGETHER = 500
"""Messages whose confirmations are awaited at the same time."""
_FRAME_OVERHEAD = 64  # bytes of a header frame that are not properties, generously
LARGEST_HEADERS = 65_536
"""Bytes for a user's headers; the engine adds its own to a dead letter, in the same frame."""

_OF_THE_CHANNEL = (exceptions.AMQPChannelError, exceptions.ChannelInvalidStateError)


class Letter(NamedTuple):
    """A message and where it goes."""

    message: Outgoing
    to: str
    """The routing key."""
    exchange: str = topology.DEFAULT_EXCHANGE
    park: bool = False
    """A delay is waited for in a parking place first; else in the queue, until somebody receives it."""
    taken: bool = False

    def parking(self) -> str | None:
        """The parking place to publish to."""
        if self.park and self.message.delay > 0:
            return topology.parking(self.message.delay)[0]
        return None


class Publisher:
    """Publishes over `link`; `queues` are those declared here, by name."""

    def __init__(self, link: Link, queues: Mapping[str, Queue]) -> None:
        self._link = link
        self._queues = queues
        self._channel: Channel | None = None
        self._choosing = asyncio.Lock()
        self._parkings: set[str] = set()
        self._flying: set[str] = set()

    async def channel(self) -> Channel:
        """The open channel for publishing.

        :raises BrokerUnavailable, BrokerRefused: no connection.
        """
        async with self._choosing:
            if self._channel is None or self._channel.is_closed:
                self._channel = await self._open()
                self._parkings.clear()
            return self._channel

    async def _open(self) -> Channel:
        channel = await self._link.channel()
        with self._link.guard():
            for exchange in (topology.EXCHANGE, topology.BROADCAST):
                await topology.ensure_exchange(channel, exchange)
        return channel

    async def publish(self, messages: Sequence[Outgoing]) -> list[PublishError | None]:
        """One copy to every queue bound to the topic, else to the queue of that name, which somebody else made.

        A delayed message goes to its queues at once, so that it is refused where there is none; whoever
        receives it there parks it.

        :raises BrokerUnavailable, BrokerRefused: nothing is known to be stored.
        """
        outcomes: list[PublishError | None] = []
        for start in range(0, len(messages), TOGETHER):
            part = messages[start : start + TOGETHER]
            found = await self._carry([Letter(one, one.topic, topology.EXCHANGE) for one in part])
            unbound = [index for index, outcome in enumerate(found) if isinstance(outcome, Unroutable)]
            if unbound:
                again = await self._carry([Letter(part[index], part[index].topic) for index in unbound])
                for index, outcome in zip(unbound, again, strict=True):
                    found[index] = outcome
            for outcome in found:
                if outcome is not None and not isinstance(outcome, PublishError):
                    raise outcome
                outcomes.append(outcome)
        return outcomes

    async def send(self, letters: Sequence[Letter]) -> list[BrokerError | None]:
        """Each into exactly one queue; what became of each, errors of the connection included."""
        outcomes: list[BrokerError | None] = []
        for start in range(0, len(letters), TOGETHER):
            outcomes += await self._carry(letters[start : start + TOGETHER])
        return outcomes

    async def _carry(self, letters: Sequence[Letter]) -> list[BrokerError | None]:
        """The driver tells returned messages apart by their ids, so no two with one id are on their way together."""
        results: list[Any] = [None] * len(letters)
        together: list[int] = []
        apart: list[int] = []
        for index, letter in enumerate(letters):
            if not topology.can_be_named(letter.to):
                results[index] = Unroutable(letter.to)  # no queue can be bound to it
            elif letter.message.id in self._flying:
                apart.append(index)
            else:
                self._flying.add(letter.message.id)
                together.append(index)
        try:
            channel = await self.channel()
            await self._prepare(channel, self._parkings, letters)
            found = await asyncio.gather(
                *[self._put(channel, letters[index]) for index in together], return_exceptions=True
            )
        finally:
            self._flying.difference_update(letters[index].message.id for index in together)
        for index, result in zip(together, found, strict=True):
            if isinstance(result, _OF_THE_CHANNEL):
                # One of them was too much for the server, which gave up on the channel: find out which.
                apart.append(index)
            else:
                results[index] = result
        if apart:
            await self._put_apart(letters, apart, results)
        return [self._outcome(letter, result) for letter, result in zip(letters, results, strict=True)]

    async def _put_apart(self, letters: Sequence[Letter], indexes: Iterable[int], results: list[Any]) -> None:
        """One after another on a channel of their own: what happens to it is the doing of one message."""
        channel: Channel | None = None
        parkings: set[str] = set()
        try:
            for index in indexes:
                if channel is None or channel.is_closed:
                    channel = await self._open()
                    parkings.clear()
                try:
                    await self._prepare(channel, parkings, [letters[index]])
                    await self._put(channel, letters[index])
                except (Exception, asyncio.CancelledError) as error:
                    if isinstance(error, asyncio.CancelledError) and cancelled_by_caller():
                        raise
                    results[index] = error
        finally:
            await self._link.close_channel(channel)

    async def _prepare(self, channel: Channel, ready: set[str], letters: Iterable[Letter]) -> None:
        """Make the parking places that are not `ready`."""
        for letter in letters:
            if letter.park and letter.message.delay > 0:
                name, milliseconds = topology.parking(letter.message.delay)
                if name not in ready:
                    with self._link.guard():
                        await topology.ensure_parking(channel, name, milliseconds)
                    ready.add(name)

    def _put(self, channel: Channel, letter: Letter) -> Awaitable[Any]:
        """Publish it: what is awaited is its confirmation. No coroutine of ours for each of many."""
        message, to = letter.message, letter.to
        levels = topology.MOST_LEVELS
        if message.priority and (queue := self._queues.get(to)) is not None and queue.priorities:
            levels = queue.priorities
        room = channel.max_content_size - _FRAME_OVERHEAD
        if letter.exchange:  # as the user published it
            room = min(room, LARGEST_HEADERS)
        try:
            properties = wire.to_properties(message, to, levels, room=room, taken=letter.taken)
        except Exception as error:  # of this message alone
            return _refused(error)
        exchange = (letter.parking() if letter.park else None) or letter.exchange
        return channel.basic_publish(
            message.body, exchange=exchange, routing_key=to, properties=properties, mandatory=True, wait=False
        )

    def _outcome(self, letter: Letter, result: Any) -> BrokerError | None:
        if result is None or not isinstance(result, BaseException):
            return None
        if isinstance(result, BrokerError):
            return result
        if isinstance(result, exceptions.PublishError):
            if letter.parking() is None:
                return Unroutable(letter.to)
            self._parkings.clear()
            return BrokerUnavailable("a parking place was removed: it is made again")
        if isinstance(result, exceptions.DeliveryError):
            queue = self._queues.get(letter.to)
            if queue is not None and queue.max_length is not None:
                return QueueFull(letter.to, queue.max_length)
            return PublishError(f"the server refused a message for {letter.to!r}: a queue is full or not available")
        if isinstance(result, exceptions.ChannelPreconditionFailed):
            return PublishError(" ".join(str(result).split()))
        if isinstance(result, (*BROKEN, asyncio.CancelledError)):
            return self._link.translate(result)
        # The driver could not write it: an id of over 255 bytes, a header of a type that AMQP does not know.
        why = " ".join(str(result).split())
        return PublishError(f"RabbitMQ cannot carry message {letter.message.id[:80]!r}: {why}")


async def _refused(error: Exception) -> None:
    raise error
