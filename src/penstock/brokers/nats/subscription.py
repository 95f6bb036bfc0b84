"""A consumer on NATS: one `Source` for each queue, one `Hand` for what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING

from penstock.brokers.base import OnLost, Release, Settlement
from penstock.brokers.nats.api import Api, Refusal, as_ours
from penstock.brokers.nats.hand import Hand
from penstock.brokers.nats.line import Line
from penstock.brokers.nats.news import Item
from penstock.brokers.nats.source import Source, join, mend
from penstock.errors import BrokerError, BrokerUnavailable
from penstock.message import Delivery
from penstock.waiting import Bell

if TYPE_CHECKING:
    from penstock.brokers.nats.broker import NatsBroker

log = logging.getLogger("penstock.nats")

MEND = 60.0
"""Seconds at most between looks at what a dead server may have left."""
HELPING = 64
"""Room for so many is worth a question of its own while there is other work in hand."""
LOOK = 1.0
"""Seconds between looks, if a wake-up should have been lost."""
CLOSE_TIMEOUT = 10.0
"""Seconds to give back what is held; one more for each `PER_SECOND` messages."""
PER_SECOND = 1000
DUE_TOLERANCE = 0.005
"""Seconds by which a delay may end early rather than be waited for once more."""

_numbers = itertools.count(1)


class NatsSubscription:
    """`prefetch` is divided among the queues, for each has a consumer of its own on the server: with more queues than
    `prefetch` each may still hold one. With `ahead=False` messages are asked for by `receive` alone. With
    `sorts=False` it takes what comes, delayed or not, and does not ask why it comes again. A lease of None is that of
    the others.
    """

    def __init__(
        self,
        broker: NatsBroker,
        names: Sequence[str],
        prefetch: int,
        lease: float | None,
        on_lost: OnLost,
        ahead: bool,
        sorts: bool = True,
    ) -> None:
        self._broker = broker
        self._link = broker.link
        self._lease = lease
        self._prefetch = prefetch
        self._ahead = ahead
        self._sorts = sorts
        queues = tuple(dict.fromkeys(names))
        more = prefetch % len(queues) if queues and prefetch > len(queues) else 0
        share = max(prefetch // max(len(queues), 1), 1)
        self._sources = [
            Source(broker.names, queue, share + (number < more) if ahead else prefetch, self._arrive, self._closed_one)
            for number, queue in enumerate(queues)
        ]
        self._hand = Hand(broker.link, broker.publisher, broker.notes, on_lost, self._changed, broker.revive)
        self._arrived: deque[Delivery] = deque()
        self._early: list[Delivery] = []
        self._again: list[Delivery] = []
        """Handed out before, and not known yet why."""
        self._bell: Bell | None = None
        self._turn = 0
        self._closed = False
        # What goes on by itself, so that nothing is lost when the call that began it is cancelled.
        self._joining: asyncio.Future[None] | None = None
        self._sorting: asyncio.Future[None] | None = None
        self._withdrawing: asyncio.Future[None] | None = None
        self._mending: asyncio.Future[None] | None = None
        self._ending: asyncio.Future[None] | None = None

    @property
    def consuming(self) -> bool:
        line = self._link.current
        return not self._closed and line is not None and all(source.is_on(line) for source in self._sources)

    def holding(self) -> dict[str, int]:
        """How much of each queue is in hand, or about to be."""
        return {source.queue: source.held for source in self._sources} if not self._closed else {}

    def doubt(self) -> None:
        """On a new line what is held is looked for before it is settled."""
        for source in self._sources:
            source.doubts += 1

    def hear(self, item: Item) -> None:
        """What is told of a queue."""
        for source in self._sources:
            if source.queue == item.queue and item.lease is None:
                source.doubts += 1
            elif source.queue == item.queue and item.lease is not None and item.lease < source.ack_wait:
                self._hand.hurry(source, item.lease)

    # -- receiving

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        asked = False
        while not self._closed:
            for source in self._sources:
                source.turn()
            if not self.consuming:
                await self._rejoin()
            self._may_ask()
            self._mend_in_time()
            self._broker.look()
            if asked and self._arrived:
                await self._have_all(limit)
            taken = self._take(limit)
            if taken:
                return taken
            left = until - loop.time()
            if self._ahead:
                for source in self._sources:
                    source.resting = False
                self._ask_for_more()
                if left <= 0:
                    break
            elif not self._waits_for_answers():
                if asked and left <= 0:
                    break
                self._ask_for(limit, max(left, 0.0))
                asked = True
                left = LOOK
            await self._bell.wait(min(max(left, 0.01), LOOK))
        return []

    def _may_ask(self) -> None:
        """:raises BrokerRefused: this user may not."""
        for source in self._sources:
            refusal, source.refusal = source.refusal, None
            if refusal is not None:
                raise refusal

    def _waits_for_answers(self) -> bool:
        return any(source.asked for source in self._sources) or bool(self._again or self._early)

    def _ask_for(self, limit: int, wait: float) -> None:
        """What is there within `wait` seconds, and no more than `limit` of it from each queue."""
        room = self._prefetch - len(self._hand.held)
        for source in self._sources:
            source.ask(min(limit, room), wait=wait)

    def _ask_for_more(self, least: int = 1) -> None:
        for source in self._sources:
            if not (source.asked or source.resting) and source.room >= min(least, source.share):
                source.ask(source.room)

    def _take(self, limit: int) -> list[Delivery]:
        """What has arrived and is still ours."""
        taken: list[Delivery] = []
        while self._arrived and len(taken) < limit:
            delivery = self._arrived.popleft()
            if self._hand.has(delivery):
                taken.append(delivery)
        return taken

    async def _have_all(self, limit: int) -> None:
        """What was asked for with `ahead=False`, so that nothing comes when the call is over."""
        assert self._bell is not None
        if len(self._sources) > 1:
            await self._withdraw()
        while self._sources[0].asked and len(self._arrived) < limit and self.consuming:
            if not await self._bell.wait(LOOK / 2):
                break

    async def _withdraw(self) -> None:
        """Of several queues that were asked one has answered: take back the question from the others."""
        if any(source.asked for source in self._sources):
            if self._withdrawing is None:
                self._withdrawing = self._by_itself(self._withdraw_all())
            await asyncio.shield(self._withdrawing)

    async def _withdraw_all(self) -> None:
        try:
            for source in self._sources:
                if source.asked:
                    await source.withdraw(self._link.timeout)
            line = self._link.current
            over = len(self._hand.held) - self._prefetch
            if line is not None and over > 0:
                strays = [self._arrived.pop() for _ in range(min(over, len(self._arrived)))]
                await self._hand.give_back(line, strays)
        except BrokerError as error:
            log.debug("questions were not withdrawn: %s", error)
        finally:
            self._withdrawing = None

    # -- arriving

    def _may_be_miscounted(self, delivery: Delivery) -> bool:
        """A server that finds that a question has no bytes left for a message (2.9) counts one delivery too few."""
        line = self._link.current
        return line is not None and len(delivery.raw) > line.largest // 2

    def _arrive(self, source: Source, delivery: Delivery) -> None:
        if not self._hand.take(delivery):
            return
        if not self._sorts:
            self._arrived.append(delivery)
            self._ring()
        elif delivery.token.delivered > 1 or self._may_be_miscounted(delivery):
            self._again.append(delivery)
            self._sort()
        elif delivery.token.due and delivery.token.due - time.time() > DUE_TOLERANCE:
            self._early.append(delivery)
            self._sort()
        else:
            self._arrived.append(delivery)
            self._ring()

    def _sort(self) -> None:
        if self._sorting is None and not self._closed:
            self._sorting = self._by_itself(self._sort_out())

    async def _sort_out(self) -> None:
        """Learn why something comes again; put back what comes before its delay is over. Until that works it stays
        in hand."""
        try:
            while (self._again or self._early) and not self._closed:
                again, early = [one for one in self._again if self._hand.has(one)], self._early
                self._again, self._early = [], []
                try:
                    line = await self._link.line()
                    if again:
                        await self._broker.notes.read(line, again)
                    now = time.time()
                    for one in again:
                        if one.token.due - now > DUE_TOLERANCE:
                            early.append(one)
                        else:
                            self._arrived.append(one)
                    again = []
                    self._ring()
                    if early:
                        await self._hand.settle([Release(one, max(one.token.due - now, 0.0)) for one in early])
                except BrokerError as error:
                    log.warning("cannot sort out what comes again, trying again in %g s: %s", LOOK, error)
                    self._again += again
                    self._early += [one for one in early if self._hand.has(one)]
                    await asyncio.sleep(LOOK)
        finally:
            self._sorting = None
            self._ring()

    def _closed_one(self, source: Source) -> None:
        self._ring()

    def _changed(self) -> None:
        """There is more room: ask for more at once, for nobody may be waiting in `receive`."""
        if self._ahead and not self._closed:
            with contextlib.suppress(BrokerUnavailable):  # `receive` finds out
                self._ask_for_more(HELPING)
        self._ring()

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    # -- joining

    async def _rejoin(self) -> None:
        if self._joining is None:
            self._joining = self._by_itself(self._join())
        joining = self._joining
        try:
            await asyncio.shield(joining)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not (self._closed and joining.cancelled()) or (task is not None and task.cancelling()):
                raise

    async def _join(self) -> None:
        """Begin every source that has none of the line.

        :raises BrokerUnavailable, BrokerRefused: it cannot be done now.
        """
        try:
            line = await self._link.line()
            line.on_end(self._ring)
            await asyncio.gather(*(self._begin(source, line) for source in self._sources if not source.is_on(line)))
        finally:
            self._joining = None

    def _mend_in_time(self) -> None:
        """What a server left behind when it died can be told from what is in hand only after a while."""
        now = time.monotonic()
        for source in self._sources:
            if now > source.mend_at and self._mending is None:
                source.pause_to_mend = min(2 * source.pause_to_mend, MEND)
                source.mend_at = now + source.pause_to_mend
                self._mending = self._by_itself(self._mend(source))

    async def _mend(self, source: Source) -> None:
        try:
            line = await self._link.line()
            consumer = await mend(Api(line, self._link.timeout), source.stream)
            if consumer is not None:
                source.know(consumer)
            if source.doubtful:
                await self._hand.check(line, {source})
        except (BrokerError, Refusal) as error:
            log.debug("queue %r: %s", source.queue, error)
        finally:
            self._mending = None

    async def _begin(self, source: Source, line: Line) -> None:
        api = Api(line, self._link.timeout)
        if source.is_forgotten:
            source.end()
        await asyncio.sleep(max(source.begin_at - time.monotonic(), 0.0))
        try:
            consumer = await join(api, source.stream, self._lease, lambda lease: self._tell(line, source, lease))
            if consumer is None:
                await self._broker.revive(source.queue)
                consumer = await join(api, source.stream, self._lease, lambda lease: self._tell(line, source, lease))
            elif queue := self._broker.queues.get(source.queue):
                await self._broker.bindings.restore(line, queue.name, (queue.name, *queue.topics))
        except Refusal as refusal:
            raise as_ours(refusal, f"queue {source.queue!r}") from None
        if consumer is None:
            raise BrokerUnavailable(f"there is no queue {source.queue!r}")
        source.know(consumer)
        if source.doubtful:
            await self._hand.check(line, {source})
        if not self._closed:
            source.begin(line, next(_numbers))
            if self._ahead:
                source.ask(source.room)

    def _tell(self, line: Line, source: Source, lease: float) -> None:
        self._broker.news.tell(line, Item(source.queue, lease))

    # -- settling

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
        if self._ahead:
            back = {item.delivery.token.source for item in items if isinstance(item, Release) and item.delay <= 0}
            await asyncio.gather(*(self._rest(source) for source in back if source in self._sources))
        return await self._hand.settle(items)

    async def _rest(self, source: Source) -> None:
        """Take back the question that is open, so that what is given back is not handed to us again unasked."""
        line = self._link.current
        if line is None or not source.is_on(line) or source.resting:
            return
        source.resting = True
        if source.asked:
            await source.withdraw(self._link.timeout)
            if not self._closed and not line.closed:
                source.begin(line, next(_numbers))

    # -- closing

    def stop(self) -> None:
        """Hand out nothing from now on."""
        self._closed = True
        self._ring()

    async def close(self) -> None:
        self.stop()
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        begun = (self._joining, self._sorting, self._withdrawing, self._mending)
        going_on = [one for one in begun if one is not None]
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT + len(self._hand.held) / PER_SECOND):
                for one in going_on:
                    await asyncio.wait({one})
                await asyncio.gather(*(source.withdraw(self._link.timeout) for source in self._sources))
                if self._hand.held:
                    line = await self._link.line()
                    if again := [one for one in self._again if self._hand.has(one)]:
                        await self._broker.notes.read(line, again)
                    await self._hand.give_back(line, list(self._hand.held.values()))
        except (BrokerError, TimeoutError) as error:
            log.warning("could not give back what was held, it comes again: %s", str(error) or "no answer in time")
        finally:
            for one in going_on:
                one.cancel()
        self._hand.stop()
        self._broker.forget(self)

    def _by_itself(self, work: Awaitable[None]) -> asyncio.Future[None]:
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever waits is told
        return task
