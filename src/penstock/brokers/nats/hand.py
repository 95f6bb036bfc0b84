"""`Hand`: what a consumer holds, how it stays ours, and how it is settled.

A message is ours from its arrival, or from the last heartbeat that the server has confirmed, for as long as the lease:
after that it counts as lost, whatever became of it, for the server gives it to others then. The connection does not
matter: what is held is still ours on the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from penstock.brokers.base import Ack, Move, OnLost, Release, Settlement
from penstock.brokers.nats.line import Line
from penstock.brokers.nats.link import Link
from penstock.brokers.nats.notes import Notes
from penstock.brokers.nats.publisher import Letter, Publisher
from penstock.brokers.nats.source import Source
from penstock.errors import BrokerError, BrokerUnavailable, QueueFull
from penstock.message import Delivery

log = logging.getLogger("penstock.nats")

BEATS = 3  # in a lease


class _Confirmed:
    """Answers of the server to the last verdict on each queue."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.error: Exception | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self, number: int, payload: bytes, block: bytes | None) -> None:
        if block is not None and block.startswith(b"NATS/1.0 503"):
            self.error = BrokerUnavailable("the stream of a queue is gone")
        self._one_less()

    def refused(self, number: int, error: Exception) -> None:
        self.error = error
        self._one_less()

    def _one_less(self) -> None:
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)


async def say(line: Line, words: Sequence[tuple[Source, bytes, bytes]], timeout: float) -> None:
    """Verdicts or heartbeats: source, where to say it, what. Those of a queue are read in their order, so that the
    answer to its last one is the answer to all.

    :raises BrokerUnavailable: it is not known whether the server has read all of it.
    """
    last = {word[0].stream: index for index, word in enumerate(words)}
    confirmed = _Confirmed(len(last))
    frames: list[bytes] = []
    for index, (source, where, what) in enumerate(words):
        reply = b""
        if last[source.stream] == index:
            reply = line.expect(confirmed, index, where.decode()) + b" "
        frames.append(b"PUB %b %b%d\r\n%b\r\n" % (where, reply, len(what), what))
    line.write(b"".join(frames))
    try:
        async with asyncio.timeout(timeout):
            await confirmed.done
    except TimeoutError:
        raise BrokerUnavailable("no answer in time") from None
    finally:
        if confirmed.left:
            line.give_up(confirmed)
    if confirmed.error is not None:
        raise confirmed.error


class Hand:
    """Of one subscription. `changed()` is called when there is more room."""

    def __init__(
        self, link: Link, publisher: Publisher, notes: Notes, on_lost: OnLost, changed: Callable[[], None]
    ) -> None:
        self.held: dict[tuple[str, str], Delivery] = {}
        """By queue and place in its stream."""
        self._link = link
        self._publisher = publisher
        self._notes = notes
        self._on_lost = on_lost
        self._changed = changed
        self._beating: asyncio.Task[None] | None = None
        self._turned = 0.0  # of the monotonic clock
        self._leaving: set[int] = set()
        """What is being given back, by its address."""

    def take(self, delivery: Delivery) -> bool:
        """Hold a message that has arrived; False: it waited here for so long that it is somebody else's by now."""
        token = delivery.token
        if self._beating is not None and time.monotonic() - self._turned > token.source.ack_wait:
            token.source.held -= 1
            return False
        key = (delivery.queue, token.place)
        before = self.held.pop(key, None)
        if before is not None:
            if id(before) in self._leaving:
                before.token.source.held -= 1  # given back a moment ago, and here again before we were told so
            else:
                self.held[key] = before
                self.lose([before])
        self.held[key] = delivery
        if self._beating is None:
            self._turned = time.monotonic()
            self._beating = asyncio.create_task(self._beat(), name="penstock nats heartbeats")
        return True

    def has(self, delivery: Delivery) -> bool:
        token = delivery.token
        return token is not None and self.held.get((delivery.queue, token.place)) is delivery

    def _drop(self, delivery: Delivery) -> None:
        token = delivery.token
        if self.held.get((delivery.queue, token.place)) is delivery:
            del self.held[delivery.queue, token.place]
        token.source.held -= 1

    # -- staying ours

    async def _beat(self) -> None:
        """As long as something is held, from the event loop: one that hangs sends none."""
        try:
            while self.held:
                lease = min(delivery.token.source.ack_wait for delivery in self.held.values())
                await asyncio.sleep(lease / BEATS)
                self.lapse()
                self._turned = now = time.monotonic()
                old = [one for one in self.held.values() if now - one.token.at > lease / BEATS]
                if old:
                    await self._tell(old, now, lease / BEATS)
        finally:
            self._beating = None

    async def _tell(self, deliveries: Sequence[Delivery], now: float, within: float) -> None:
        words = [(one.token.source, one.token.ack, b"+WPI") for one in deliveries]
        try:
            async with asyncio.timeout(within):
                line = await self._link.line()
                await say(line, words, within)
        except (BrokerError, TimeoutError) as error:
            log.debug("heartbeats were not confirmed: %s", error)
        else:
            for source in {word[0] for word in words}:
                source.beaten = now

    def lapse(self) -> None:
        """Give up what the server gives to others by now."""
        now = time.monotonic()
        self.lose([delivery for delivery in self.held.values() if self._is_late(delivery, now)])

    def _is_late(self, delivery: Delivery, now: float) -> bool:
        source = delivery.token.source
        return bool(now - max(delivery.token.at, source.beaten) > source.ack_wait)

    def lose(self, deliveries: Sequence[Delivery]) -> None:
        if not deliveries:
            return
        for delivery in deliveries:
            delivery.lost = True
            self._drop(delivery)
        self._on_lost(deliveries)
        self._changed()

    def stop(self) -> None:
        """Forget everything that is still held."""
        for delivery in list(self.held.values()):
            self._drop(delivery)
        if self._beating is not None:
            self._beating.cancel()

    # -- settling

    async def settle(self, items: Sequence[Settlement]) -> list[Delivery]:
        """Those that were not ours.

        :raises BrokerError: some of it could not be done, and what it was is still held.
        """
        now = time.monotonic()
        if any(self.has(item.delivery) and self._is_late(item.delivery, now) for item in items):
            self.lapse()
        ours: list[Settlement] = []
        lost: list[Delivery] = []
        seen = set[int]()
        for item in items:
            delivery = item.delivery
            if self.has(delivery) and id(delivery) not in seen:
                seen.add(id(delivery))
                ours.append(item)
            else:
                lost.append(delivery)
        if not ours:
            return lost
        line = await self._link.line()
        done = [item for item in ours if isinstance(item, Ack)]
        moves = [item for item in ours if isinstance(item, Move)]
        releases = [item for item in ours if isinstance(item, Release)]
        errors: list[BrokerError] = []
        work: list[Awaitable[None]] = [self._say(line, [(item.delivery, b"+ACK") for item in done])]
        if moves:
            work.append(self._move(line, moves))
        if releases:
            work.append(self._release(line, releases))
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(outcome, BrokerError):
                errors.append(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
        if errors:
            raise errors[0]
        return lost

    async def _say(self, line: Line, verdicts: Sequence[tuple[Delivery, bytes]]) -> None:
        """Tell the server, and hold them no more once it has read it."""
        if not verdicts:
            return
        words = [(delivery.token.source, delivery.token.ack, what) for delivery, what in verdicts]
        await say(line, words, self._link.timeout)
        for delivery, _ in verdicts:
            if self.has(delivery):
                self._drop(delivery)
        self._changed()

    async def _move(self, line: Line, moves: Sequence[Move]) -> None:
        """Publish first, then acknowledge. Moved again after a doubt it is stored once, for its id says which
        delivery it was."""
        letters = []
        for move in moves:
            token = move.delivery.token
            msg_id = f"{token.source.stream}.{token.stamp}.{token.place}.{token.delivered}"
            letters.append(Letter(move.message, move.to, move.to, msg_id))
        outcomes = await self._publisher.send(letters, line)
        moved = [move.delivery for move, outcome in zip(moves, outcomes, strict=True) if outcome is None]
        await self._say(line, [(delivery, b"+ACK") for delivery in moved])
        for outcome in outcomes:
            if isinstance(outcome, QueueFull):
                raise BrokerUnavailable(f"{outcome}: a message that is to go there waits for room")
            if outcome is not None:
                raise outcome

    async def _release(self, line: Line, releases: Sequence[Release]) -> None:
        await self._notes.write(line, [item.delivery for item in releases])
        leaving = {id(item.delivery) for item in releases}
        self._leaving |= leaving
        try:
            await self._say(line, [(item.delivery, nak(item.delay)) for item in releases])
        finally:
            self._leaving -= leaving

    async def give_back(self, line: Line, deliveries: Iterable[Delivery]) -> None:
        """Uncounted.

        :raises BrokerUnavailable: they come again by themselves.
        """
        releases = [Release(one) for one in deliveries]
        if releases:
            await self._release(line, releases)


def nak(delay: float) -> bytes:
    """Give a message back, to be handed out again after so many seconds."""
    return b"-NAK" if delay <= 0 else b'-NAK {"delay": %d}' % round(delay * 1e9)
