"""`Publisher`: confirmed publishing on one channel, with an outcome for every message."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from aiormq import exceptions
from aiormq.channel import Channel
from pamqp.commands import Basic

from penstock.brokers.amqp import topology, wire
from penstock.brokers.amqp.confirmed import Confirmed, Item
from penstock.brokers.amqp.line import room_for_headers
from penstock.brokers.amqp.link import BROKEN, Link, cancelled_by_caller
from penstock.brokers.base import Queue
from penstock.errors import BrokerError, BrokerUnavailable, PublishError, QueueFull, Unroutable
from penstock.message import Outgoing

TOGETHER = 500
"""Messages whose confirmations are awaited at the same time."""

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
        self._confirmed: Confirmed | None = None
        self._choosing = asyncio.Lock()
        self._parkings: set[str] = set()
        self._flying: set[str] = set()

    async def open(self) -> Confirmed:
        """The open channel for publishing.

        :raises BrokerUnavailable, BrokerRefused: no connection.
        """
        async with self._choosing:
            if self._confirmed is None or self._confirmed.closed:
                self._confirmed = Confirmed(await self._new_channel())
                self._parkings.clear()
            return self._confirmed

    async def _new_channel(self) -> Channel:
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

    async def broadcast(self, message: Outgoing) -> None:
        """To whoever listens; that nobody does is no error.

        :raises BrokerUnavailable, PublishError: it may not have been sent.
        """
        confirmed = await self.open()
        letter = Letter(message, message.topic, topology.BROADCAST)
        item = self._item(confirmed.channel, letter)
        [result] = await confirmed.put([item._replace(id=f"broadcast {message.id}")])
        outcome = self._outcome(letter, result)
        if outcome is not None and not isinstance(outcome, Unroutable):
            raise outcome

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
            confirmed = await self.open()
            await self._prepare(confirmed.channel, self._parkings, letters)
            items, written = self._items(confirmed.channel, letters, together, results)
            found = await confirmed.put(items)
        finally:
            self._flying.difference_update(letters[index].message.id for index in together)
        for index, result in zip(written, found, strict=True):
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
                    channel = await self._new_channel()
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

    def _items(
        self, channel: Channel, letters: Sequence[Letter], indexes: Sequence[int], results: list[Any]
    ) -> tuple[list[Item], list[int]]:
        """Those that can be written, and which they are; why not, of the others, goes into `results`."""
        items, written = [], []
        for index in indexes:
            try:
                items.append(self._item(channel, letters[index]))
            except Exception as error:  # of this message alone
                results[index] = error
            else:
                written.append(index)
        return items, written

    def _item(self, channel: Channel, letter: Letter) -> Item:
        room = room_for_headers(channel, of_the_user=bool(letter.exchange))
        properties = self.properties(letter.message, letter.to, room, letter.taken)
        exchange = (letter.parking() if letter.park else None) or letter.exchange
        return Item(letter.message.id, exchange, letter.to, properties, letter.message.body)

    async def _put(self, channel: Channel, letter: Letter) -> None:
        """Publish one and wait for its confirmation, as the driver does it."""
        item = self._item(channel, letter)
        await channel.basic_publish(
            item.body, exchange=item.exchange, routing_key=item.to, properties=item.properties, mandatory=True
        )

    def properties(self, message: Outgoing, to: str, room: int, taken: bool = False) -> Basic.Properties:
        """:raises PublishError: they cannot be written, or not in `room` bytes."""
        levels = topology.MOST_LEVELS
        if message.priority and (queue := self._queues.get(to)) is not None and queue.priorities:
            levels = queue.priorities
        return wire.to_properties(message, to, levels, room=room, taken=taken)

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
            return self.full(letter.to)
        if isinstance(result, exceptions.ChannelPreconditionFailed):
            return PublishError(" ".join(str(result).split()))
        if isinstance(result, (*BROKEN, asyncio.CancelledError)):
            return self._link.translate(result)
        return unwritable(letter.message, result)

    def full(self, to: str) -> PublishError:
        """What it means that the server does not take a message with this routing key."""
        bound = [queue for queue in self._queues.values() if to in (queue.name, *queue.topics)]
        limits = [(queue.max_length, queue.name) for queue in bound if queue.max_length is not None]
        if limits:  # of several the server does not say which
            limit, name = min(limits)
            return QueueFull(name, limit)
        return PublishError(f"the server refused a message for {to!r}: a queue is full or not available")


def unwritable(message: Outgoing, error: BaseException) -> PublishError:
    """What the driver cannot write: an id of over 255 bytes, a header of a type that AMQP does not know."""
    if isinstance(error, PublishError):
        return error
    return PublishError(f"RabbitMQ cannot carry message {message.id[:80]!r}: {' '.join(str(error).split())}")
