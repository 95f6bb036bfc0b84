"""Requests on RabbitMQ, by direct reply-to: on one channel they are published and their replies arrive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from penstock.brokers.amqp import topology, wire
from penstock.brokers.amqp.handover import hand_over
from penstock.brokers.amqp.line import Line
from penstock.brokers.amqp.publisher import unwritable
from penstock.brokers.base import OnRefused
from penstock.errors import BrokerError, BrokerUnavailable, Unroutable
from penstock.message import Outgoing

if TYPE_CHECKING:
    from penstock.brokers.amqp.broker import AmqpBroker

log = logging.getLogger("penstock.amqp")

LOOK = 1.0
"""Seconds after which the server is asked whether it has dealt with what was requested until then."""
REMEMBER = 10.0
"""Seconds for which it is remembered by which exchange a name was found."""


MOST_REMEMBERED = 10_000


class _Asked:
    """A request of which it is not known yet whether a queue took it."""

    __slots__ = ("exchange", "refused", "topic", "twice")

    def __init__(self, topic: str, exchange: str, refused: OnRefused) -> None:
        self.topic = topic
        self.exchange = exchange
        self.refused = refused
        self.twice = False
        """It is on its way by the other exchange."""


class Ways:
    """By which exchange a name is reached: a queue that somebody else made is bound to the default one only."""

    def __init__(self) -> None:
        self._by_default: dict[str, float] = {}  # → until when, of the monotonic clock

    def to(self, name: str) -> str:
        until = self._by_default.get(name)
        if until is None:
            return topology.EXCHANGE
        if until > time.monotonic():
            return topology.DEFAULT_EXCHANGE
        del self._by_default[name]
        return topology.EXCHANGE

    def not_by(self, exchange: str, name: str) -> str:
        """The other exchange, which is remembered."""
        if exchange == topology.DEFAULT_EXCHANGE:
            self._by_default.pop(name, None)
            return topology.EXCHANGE
        if len(self._by_default) >= MOST_REMEMBERED:
            self._by_default.clear()
        self._by_default[name] = time.monotonic() + REMEMBER
        return topology.DEFAULT_EXCHANGE

    def forget(self, name: str) -> None:
        self._by_default.pop(name, None)


class Requests:
    """The requests of one channel, until that is gone; then `gone` is called, and no reply comes any more.

    Without confirmations (`confirms=False`) a queue that refuses a message because it is full is not noticed,
    and each request costs the server less. What no queue takes comes back in any case, before the answer to
    whatever the server is asked later on the same channel.
    """

    def __init__(
        self,
        broker: AmqpBroker,
        channel: Channel,
        arrive: Callable[[DeliveredMessage], None],
        gone: Callable[[Requests], None],
    ) -> None:
        self._broker = broker
        self._link = broker.publishing
        self._line = Line(channel)
        self._arrive = arrive
        self._gone = gone
        # By id; in the order of asking. Several may have one id.
        self._asked: dict[str, list[_Asked]] = {}
        self._before: dict[str, list[_Asked]] = {}
        """Those asked before the question that the server has not answered yet."""
        self._by_tag: dict[int, tuple[str, _Asked]] = {}
        self._tag = 0
        self._looking: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._background: set[asyncio.Future[None]] = set()
        self._over = False
        self._silent = False

    @property
    def closed(self) -> bool:
        return self._line.closed

    async def open(self) -> None:
        channel: Any = self._line.channel
        channel._on_return_frame = self._on_return
        if channel.publisher_confirms:
            channel._on_confirm_frame = self._on_confirm
        channel.closing.add_done_callback(lambda _: self._end())
        channel.on_consumer_cancel_callbacks.add(self._cancelled)
        await topology.ensure_exchange(channel)
        ok = await channel.basic_consume(wire.REPLY_TO, self._consume, no_ack=True)
        hand_over(channel, str(ok.consumer_tag), self._replied)

    async def close(self) -> None:
        """Nobody is told anything more."""
        self._silent = True
        self._end()
        await self._link.close_channel(self._line.channel)

    async def ask(self, message: Outgoing, refused: OnRefused) -> None:
        """:raises BrokerUnavailable: it was not sent."""
        if not topology.can_be_named(message.topic):
            refused(Unroutable(message.topic))  # no queue can be bound to it
            return
        exchange = self._broker.ways.to(message.topic)
        try:
            properties = self._broker.publisher.properties(message, message.topic, self._line.room)
            properties.reply_to = wire.REPLY_TO
            properties.correlation_id = message.id  # by which others tell replies apart
            data = self._line.marshal(exchange, message.topic, properties, message.body, mandatory=True)
        except Exception as error:  # of this message alone
            refused(unwritable(message, error))
            return
        with self._link.guard():
            await self._line.write(data)
        self._remember(message.id, _Asked(message.topic, exchange, refused))

    def _remember(self, id: str, asked: _Asked) -> None:
        """It was written just now: nothing can have come back yet."""
        self._asked.setdefault(id, []).append(asked)
        if self._line.channel.publisher_confirms:
            self._tag += 1
            self._by_tag[self._tag] = (id, asked)
        elif self._timer is None and self._looking is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK, self._look)

    # -- what the server says

    async def _consume(self, message: DeliveredMessage) -> None:
        self._replied(message)

    def _replied(self, message: DeliveredMessage) -> None:
        properties = message.header.properties
        id = properties.message_id = properties.correlation_id or properties.message_id  # others give both
        for known in (self._asked, self._before):
            if id in known:  # so it was taken
                self._forget(id, known[id][0])
                break
        self._arrive(message)

    async def _on_return(self, frame: Basic.Return) -> None:
        """In place of the driver's, which knows the messages of channels with confirmations only."""
        channel = self._line.channel
        header = await channel._get_frame()
        assert isinstance(header, ContentHeader)
        message = await channel._read_content(frame, header)
        id, topic = str(header.properties.message_id), str(frame.routing_key)
        asked = next((one for one in self._known(id) if (one.topic, one.exchange) == (topic, frame.exchange)), None)
        if asked is None:
            return
        self._forget(id, asked)
        if asked.twice:
            self._broker.ways.forget(topic)
            self._tell(asked, Unroutable(topic))
        else:
            self._in_background(self._ask_again(id, asked, message))

    async def _ask_again(self, id: str, asked: _Asked, message: DeliveredMessage) -> None:
        asked.twice = True
        asked.exchange = self._broker.ways.not_by(asked.exchange, asked.topic)
        properties = message.header.properties
        properties.reply_to = wire.REPLY_TO
        try:
            data = self._line.marshal(asked.exchange, asked.topic, properties, message.body, mandatory=True)
            with self._link.guard():
                await self._line.write(data)
        except BrokerError as error:
            self._tell(asked, error)
        else:
            self._remember(id, asked)

    async def _on_confirm(self, frame: Basic.Ack | Basic.Nack) -> None:
        tag = frame.delivery_tag or 0
        for one in [one for one in self._by_tag if one <= tag] if frame.multiple else [tag]:
            id, asked = self._by_tag.pop(one, ("", None))
            if asked is not None and asked in self._known(id):  # else it came back before
                self._forget(id, asked)
                if isinstance(frame, Basic.Nack):
                    self._tell(asked, self._broker.publisher.full(asked.topic))

    def _known(self, id: str) -> list[_Asked]:
        """The requests with an id of which nothing is known yet; the oldest first."""
        return self._before.get(id, []) + self._asked.get(id, [])

    def _forget(self, id: str, asked: _Asked) -> None:
        for known in (self._before, self._asked):
            some = known.get(id, [])
            if asked in some:
                some.remove(asked)
                if not some:
                    del known[id]

    def _tell(self, asked: _Asked, error: BrokerError) -> None:
        if self._silent:
            return
        try:
            asked.refused(error)
        except Exception:  # in the driver's reader it would cost the channel
            log.exception("who requested %r could not be told: %s", asked.topic, error)

    def _look(self) -> None:
        self._timer = None
        self._looking = self._in_background(self._settle())

    async def _settle(self) -> None:
        """What was requested before and is not back when the server answers has been taken."""
        self._before, self._asked = self._asked, {}
        try:
            with self._link.guard():
                await self._line.channel.basic_qos(prefetch_count=0)
        finally:
            self._looking = None
        self._before.clear()
        if self._asked:
            self._timer = asyncio.get_running_loop().call_later(LOOK, self._look)

    # -- the end

    async def _cancelled(self, frame: Basic.Cancel) -> None:
        """The server sends no more replies."""
        self._line.ended = True
        self._in_background(self._link.close_channel(self._line.channel))

    def _end(self) -> None:
        if self._over:
            return
        self._over = self._line.ended = True
        if self._timer is not None:
            self._timer.cancel()
        unknown = [asked for known in (self._before, self._asked) for some in known.values() for asked in some]
        self._before, self._asked, self._by_tag = {}, {}, {}
        self._gone(self)
        reason = self._line.channel._close_exception
        error = BrokerUnavailable("the connection was closed") if reason is None else self._link.translate(reason)
        for asked in unknown:
            self._tell(asked, error)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # `_end` tells of it
        return task
