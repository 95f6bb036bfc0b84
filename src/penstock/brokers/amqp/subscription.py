"""A consumer on RabbitMQ: one channel, made again with its consumers whenever it is gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp.commands import Basic

from penstock.brokers.amqp import topology, wire
from penstock.brokers.amqp.hand import Hand
from penstock.brokers.amqp.handover import hand_over
from penstock.brokers.base import OnLost, Release, Settlement
from penstock.errors import BrokerError
from penstock.message import Delivery
from penstock.waiting import Bell

if TYPE_CHECKING:
    from penstock.brokers.amqp.broker import AmqpBroker

log = logging.getLogger("penstock.amqp")

LARGE_HELPING = 64
LOOK = 1.0
"""Seconds between looks: at a queue from which nothing may be taken ahead, and for a wake-up that was lost."""
VERIFY = 5.0
"""Seconds without a message or one in hand, after which the server is asked whether it still knows our consumers."""
REMAKE_AFTER = 0.25
"""Seconds before a queue is made again that was deleted: one that RabbitMQ is still deleting it makes badly."""
CLOSE_TIMEOUT = 10.0
"""Seconds to give back what is held; one more for each `PER_SECOND` messages."""
PER_SECOND = 1000
DUE_TOLERANCE = 0.005
"""Seconds by which a delay may end early rather than be parked once more."""
MOST_PREFETCH = 65_535  # AMQP has 16 bits for it


class AmqpSubscription:
    """Consumers of some queues on one channel.

    `prefetch` is divided among the queues, for quorum queues know no common one: with more queues than
    `prefetch` each still holds one. With `ahead=False` messages are fetched one by one when asked for.
    """

    def __init__(self, broker: AmqpBroker, names: Sequence[str], prefetch: int, on_lost: OnLost, ahead: bool) -> None:
        self._broker = broker
        self._link = broker.consuming
        self._names = tuple(dict.fromkeys(names))
        self._prefetch = min(prefetch, MOST_PREFETCH)
        self._on_lost = on_lost
        self._ahead = ahead
        self._channel: Channel | None = None
        self._hand: Hand | None = None
        self._tags: dict[str, str] = {}  # consumer tag → queue
        self._deleted: set[str | None] = set()
        """Those that the server said to have gone."""
        self._arrived: deque[Delivery] = deque()
        self._early: list[Delivery] = []
        self._bell: Bell | None = None
        self._turn = 0
        self._quiet_since = self._remake_at = 0.0  # of the loop's clock
        self._closed = False
        # What goes on by itself, so that nothing is lost when the call that began it is cancelled.
        self._joining: asyncio.Future[None] | None = None
        self._fetching: asyncio.Future[None] | None = None
        self._parking: asyncio.Future[None] | None = None
        self._ending: asyncio.Future[None] | None = None
        self._dropping: asyncio.Future[None] | None = None

    @property
    def consuming(self) -> bool:
        channel = self._channel
        live = channel is not None and not channel.is_closed and self._link.connected
        return live and not self._closed and (not self._ahead or len(self._tags) == len(self._names))

    @property
    def _holding(self) -> int:
        return 0 if self._hand is None else len(self._hand.held)

    # -- receiving

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        while not self._closed:
            if not self.consuming:
                await self._rejoin()
            if not self._ahead and not self._arrived:
                if self._fetching is None:
                    self._fetching = self._by_itself(self._fetch(limit))
                await asyncio.shield(self._fetching)
            await self._let_more_come(limit)
            taken = self._take(limit)
            if taken:
                return taken
            left = until - loop.time()
            if left <= 0:
                break
            if await self._bell.wait(min(left, LOOK)) or self._holding:
                self._quiet_since = loop.time()
            elif loop.time() - self._quiet_since > VERIFY and self._ahead:
                self._quiet_since = loop.time()
                await self._verify()
        return []

    async def _let_more_come(self, limit: int) -> None:
        """The server sends a few at a time: while each turn of the loop brings more, a larger helping is cheaper."""
        seen = 0
        while seen < len(self._arrived) < min(limit, LARGE_HELPING):
            seen = len(self._arrived)
            await asyncio.sleep(0)

    async def _rejoin(self) -> None:
        if self._joining is None:
            self._joining = self._by_itself(self._join())
        try:
            await asyncio.shield(self._joining)
        except BrokerError:
            if not self._closed:
                raise

    def _take(self, limit: int) -> list[Delivery]:
        """What has arrived, but for what nobody has had in hand and has expired meanwhile."""
        taken: list[Delivery] = []
        arrived = self._arrived
        if self._closed:
            return taken
        while arrived and len(taken) < limit:
            delivery = arrived.popleft()
            if delivery.expires_at is not None and not self._still_wanted(delivery):
                continue
            taken.append(delivery)
        return taken

    def _still_wanted(self, delivery: Delivery) -> bool:
        """The server drops only at the head of a queue, and forgets the time of what has been parked."""
        token: wire.Token = delivery.token
        if delivery.redelivered or token.taken or (delivery.expires_at or 0.0) > time.time():
            delivery.token = token._replace(taken=True)
            return True
        log.debug("message %s of %r has expired", delivery.id, delivery.queue)
        if self._hand is not None:
            self._hand.drop(delivery)
        return False

    async def _fetch(self, limit: int) -> None:
        """Ask the queues in turn for up to `limit` messages."""
        try:
            empty = 0
            while empty < len(self._names) and len(self._arrived) < limit and self._holding < self._prefetch:
                channel = self._channel
                if channel is None or self._closed:
                    return
                self._turn = (self._turn + 1) % len(self._names)
                name = self._names[self._turn]
                with self._link.guard():
                    message = await channel.basic_get(name)
                if isinstance(message.delivery, Basic.GetOk):
                    self._arrive(channel, name, message)
                    empty = 0
                else:
                    empty += 1
        finally:
            self._fetching = None

    def _arrive(self, channel: Channel, name: str, message: DeliveredMessage) -> None:
        if channel is not self._channel or self._hand is None:
            return  # of a channel that is gone: it comes again
        tag: int = message.delivery.delivery_tag  # type: ignore[union-attr, assignment]  # it is no `Return`
        delivery = wire.to_delivery(message, name, tag)
        self._hand.held[tag] = delivery
        due = delivery.token.due
        if due and due - time.time() > DUE_TOLERANCE:
            self._early.append(delivery)
            if self._parking is None:
                self._parking = self._by_itself(self._park())
            return
        self._arrived.append(delivery)
        if self._bell is not None:
            self._bell.ring()

    async def _park(self) -> None:
        """Back to waiting with what came before its delay was over; until that works it stays in hand."""
        try:
            while self._early and not self._closed:
                early, self._early = self._early, []
                now = time.time()
                try:
                    await self.settle([Release(one, max(one.token.due - now, 0.0)) for one in early])
                except BrokerError as error:
                    log.warning("cannot put back what is delayed, again in %g s: %s", LOOK, error)
                    self._early += [one for one in early if not one.lost]
                    await asyncio.sleep(LOOK)
        finally:
            self._parking = None

    # -- the channel

    async def _join(self) -> None:
        """A channel with all its consumers. What was held on one that is gone is lost to us.

        :raises BrokerUnavailable, BrokerRefused: it cannot be had now.
        """
        try:
            if self._channel is None or self._channel.is_closed:
                self._drop_channel()
                self._use(await self._link.channel(confirms=False))
            channel = self._channel
            assert channel is not None
            await asyncio.sleep(self._remake_at - asyncio.get_running_loop().time())
            for name in self._names:
                if self._closed or (self._ahead and name in self._tags.values()):
                    continue
                await self._broker.revive(name, deleted=name in self._deleted)
                self._deleted.discard(name)
                if self._ahead:
                    with self._link.guard():
                        await channel.basic_qos(prefetch_count=max(self._prefetch // len(self._names), 1))
                        ok = await channel.basic_consume(name, self._consume_on(channel, name))
                    if channel is self._channel:
                        self._tags[str(ok.consumer_tag)] = name
                        hand_over(channel, str(ok.consumer_tag), partial(self._arrive, channel, name))
        finally:
            self._joining = None

    def _use(self, channel: Channel) -> None:
        channel.on_consumer_cancel_callbacks.add(self._cancelled)
        channel.closing.add_done_callback(lambda _: self._gone(channel))
        self._channel = channel
        self._hand = Hand(channel, self._broker.publisher, max(self._prefetch // 2, 1), lambda: self._gone(channel))

    def _consume_on(self, channel: Channel, name: str) -> Callable[[DeliveredMessage], Coroutine[Any, Any, None]]:
        async def consume(message: DeliveredMessage) -> None:
            self._arrive(channel, name, message)

        return consume

    def _cancelled(self, frame: Basic.Cancel) -> None:
        """The server ended a consumer: its queue was deleted, or its node stopped."""
        name = self._tags.pop(str(frame.consumer_tag), None)
        log.warning("the server cancelled the consumer of %r: consuming it again", name)
        self._deleted.add(name)
        self._remake_at = asyncio.get_running_loop().time() + REMAKE_AFTER
        if self._bell is not None:
            self._bell.ring()

    async def _verify(self) -> None:
        """Of a queue that is deleted while it is being joined the server says nothing."""
        for tag, name in list(self._tags.items()):
            if not await topology.is_consumed(self._link, name):
                log.warning("the server has forgotten the consumer of %r: consuming it again", name)
                self._deleted.add(name)
                if self._channel is not None:
                    with self._link.guard():
                        await self._channel.basic_cancel(tag)
                self._tags.pop(tag, None)

    def _gone(self, channel: Channel) -> None:
        if channel is not self._channel:
            return
        reason = str(getattr(channel, "_close_exception", None) or "")
        if "acknowledgement" in reason and "timed out" in reason:
            log.warning(
                "a handler took longer than the server's consumer_timeout, and its message comes again: "
                "raise consumer_timeout in rabbitmq.conf (%s)",
                reason,
            )
        if "no queue" in reason:
            self._deleted.update(self._names)
        self._drop_channel()

    def _drop_channel(self) -> None:
        """Give up the channel and with it all that we held on it."""
        channel, self._channel = self._channel, None
        hand, self._hand = self._hand, None
        for gone in (self._tags, self._arrived, self._early):
            gone.clear()
        if channel is not None and not channel.is_closed:
            self._dropping = asyncio.ensure_future(self._link.close_channel(channel))
        lost = [] if hand is None else hand.lose()
        if lost and not self._closed:
            self._on_lost(lost)
        if self._bell is not None:
            self._bell.ring()

    # -- settling

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
        if self._hand is None:
            return [item.delivery for item in items]
        lost = await self._hand.settle(items)
        if self._bell is not None:
            self._bell.ring()
        return lost

    # -- closing

    def stop(self) -> None:
        """Hand out nothing from now on."""
        self._closed = True
        if self._bell is not None:
            self._bell.ring()

    async def close(self) -> None:
        self.stop()
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT + self._holding / PER_SECOND):
                for going_on in (self._joining, self._fetching, self._parking):
                    if going_on is not None:
                        await asyncio.wait({going_on})
                await self._give_back()
        except (BrokerError, TimeoutError) as error:
            log.warning("could not give back what was held, it comes again: %s", error or "no answer in time")
        self._drop_channel()
        if self._dropping is not None:
            await asyncio.wait({self._dropping})
        self._broker.forget(self)

    async def _give_back(self) -> None:
        channel, hand = self._channel, self._hand
        if channel is None or hand is None:
            return
        with self._link.guard():
            for tag in list(self._tags):
                await channel.basic_cancel(tag)
            self._tags.clear()
            await hand.give_back()

    def _by_itself(self, work: Awaitable[None]) -> asyncio.Future[None]:
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever waits is told
        return task
