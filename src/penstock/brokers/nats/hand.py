"""`Hand`: what a consumer holds, how it stays ours, and how it is settled.

A message is ours from its arrival, or from the last heartbeat that the server has confirmed, for as long as the lease:
after that it counts as lost, whatever became of it, for the server gives it to others then. The connection does not
matter: what is held is still ours on the next one, if it is still there. A place in a stream is no name: a stream that
was made anew, or has lost its end with its machine, gives the same places to other messages, and settling ours would
remove those. So what is held is looked for on every new line, and whenever its stream is in doubt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

import msgspec

from penstock import codec
from penstock.brokers.base import Ack, Move, OnLost, Release, Settlement
from penstock.brokers.nats import wire
from penstock.brokers.nats.api import Api, Refusal, as_ours
from penstock.brokers.nats.line import Line
from penstock.brokers.nats.link import Link
from penstock.brokers.nats.notes import Note, Notes
from penstock.brokers.nats.publisher import Letter, Publisher
from penstock.brokers.nats.source import Source
from penstock.errors import BrokerError, BrokerUnavailable, QueueFull, Unroutable, one_line
from penstock.message import Delivery, Outgoing

log = logging.getLogger("penstock.nats")

BEATS = 3  # in a lease
LOOKS = 32
"""Messages in hand that are looked for at a time."""

LATER = 3600.0
"""Seconds after which is tried again what is too large for where it is to go."""

_READ_BY = (codec.CONTENT_TYPE, codec.CONTENT_ENCODING)


class StreamGoneError(BrokerUnavailable):
    """Nobody hears what is said of a queue's messages."""


class _Confirmed:
    """Answers of the server to the last verdict on each queue."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.left = set(numbers)
        self.errors: dict[int, Exception] = {}
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self, number: int, payload: bytes, block: bytes | None) -> None:
        if block is not None and block.startswith(b"NATS/1.0 503"):
            self.errors[number] = StreamGoneError("the stream of a queue is gone")
        self._one_less(number)

    def refused(self, number: int, error: Exception) -> None:
        self.errors[number] = error
        self._one_less(number)

    def _one_less(self, number: int) -> None:
        self.left.discard(number)
        if not self.left and not self.done.done():
            self.done.set_result(None)


async def say(line: Line, words: Sequence[tuple[Source, bytes, bytes]], timeout: float) -> dict[Source, Exception]:
    """Verdicts or heartbeats: source, where to say it, what. Those of a queue are read in their order, so that the
    answer to its last one is the answer to all. Returns why it is not known of some queues whether they were read.

    :raises BrokerUnavailable: the connection has ended.
    """
    last = {word[0]: index for index, word in enumerate(words)}
    confirmed = _Confirmed(last.values())
    frames: list[bytes] = []
    for index, (source, where, what) in enumerate(words):
        reply = b""
        if last[source] == index:
            reply = line.expect(confirmed, index, where.decode()) + b" "
        frames.append(b"PUB %b %b%d\r\n%b\r\n" % (where, reply, len(what), what))
    line.write(b"".join(frames))
    try:
        await asyncio.wait({confirmed.done}, timeout=timeout)
    finally:
        if confirmed.left:
            line.give_up(confirmed)
    unknown = {index: BrokerUnavailable("no answer in time") for index in confirmed.left}
    errors = {**unknown, **confirmed.errors}
    return {source: errors[index] for source, index in last.items() if index in errors}


class Hand:
    """Of one subscription. `changed()` is called when there is more room, `revive(queue)` makes one again that was
    deleted."""

    def __init__(
        self,
        link: Link,
        publisher: Publisher,
        notes: Notes,
        on_lost: OnLost,
        changed: Callable[[], None],
        revive: Callable[[str], Awaitable[None]],
    ) -> None:
        self.held: dict[tuple[str, str], Delivery] = {}
        """By queue and place in its stream: of two messages with one place the older is no longer there."""
        self._link = link
        self._publisher = publisher
        self._notes = notes
        self._on_lost = on_lost
        self._changed = changed
        self._revive = revive
        self._beating: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._turned = 0.0  # of the monotonic clock
        self._leaving: set[int] = set()
        """What is being given back, by its address."""

    def take(self, delivery: Delivery) -> bool:
        """Hold a message that has arrived; False: it waited here for so long that it is somebody else's by now, or it
        is in hand already, for its consumer was made again."""
        token = delivery.token
        if self._beating is not None and time.monotonic() - self._turned > token.source.ack_wait:
            token.source.held -= 1
            return False
        key = (delivery.queue, token.place)
        before = self.held.get(key)
        if before is not None:
            if id(before) in self._leaving:
                self._drop(before)  # given back a moment ago, and here again before we were told so
            elif before.token.stamp == token.stamp and token.delivered <= before.token.delivered:
                before.token = token
                token.source.held -= 1
                return False
            else:
                token.source.doubts += before.token.stamp != token.stamp
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
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(lease / BEATS):
                        await self._hurry.wait()
                self._hurry.clear()
                self.lapse()
                self._turned = now = time.monotonic()
                if self.held:
                    await self._tell(list(self.held.values()), now, lease / BEATS)
        finally:
            self._beating = None

    def hurry(self, source: Source, lease: float) -> None:
        """A shorter lease is to come: tell the server at once of what is held."""
        source.soon = lease
        self._hurry.set()
        if self._beating is None:
            source.hasten()

    async def _tell(self, deliveries: Sequence[Delivery], now: float, within: float) -> None:
        words = [(one.token.source, one.token.ack, b"+WPI") for one in deliveries]
        sources = {word[0] for word in words}
        try:
            async with asyncio.timeout(within):
                line = await self._link.line()
                failed = await say(line, words, within)
                for source in sources - failed.keys():
                    source.beaten = now
                self._end_gone(failed)
                await self._look(line, sources - failed.keys())
        except (BrokerError, Refusal, TimeoutError) as error:
            log.debug("heartbeats were not confirmed: %s", error)
        for source in sources:
            source.hasten()

    async def _look(self, line: Line, sources: Collection[Source]) -> None:
        """Whether the consumers are what they were; the lease is whoever's is the shortest."""
        api = Api(line, self._link.timeout)
        found = await asyncio.gather(*(api.consumer(source.stream) for source in sources))
        for source, consumer in zip(sources, found, strict=True):
            if consumer is None:
                source.end()
            else:
                source.know(consumer)
        await self.check(line, {source for source in sources if source.doubtful})
        self._changed()

    def _end_gone(self, failed: dict[Source, Exception]) -> None:
        """Those whose streams are gone begin again, and only they."""
        for source, error in failed.items():
            if isinstance(error, StreamGoneError):
                source.end()
        if failed:
            self._changed()

    async def check(self, line: Line, sources: Collection[Source]) -> None:
        """Lose what is held of these queues and is no longer in its place.

        :raises BrokerUnavailable, BrokerRefused: it is not known.
        """
        if not sources:
            return
        held: dict[Source, list[Delivery]] = {source: [] for source in sources}
        for one in self.held.values():
            if one.token.source in held:
                held[one.token.source].append(one)
        api = Api(line, self._link.timeout)
        await asyncio.gather(*(self._check(api, source, ones) for source, ones in held.items()))

    async def _check(self, api: Api, source: Source, held: list[Delivery]) -> None:
        doubts = source.doubts
        try:
            gone = await self._gone(api, source.stream, held)
        except Refusal as refusal:
            raise as_ours(refusal, f"queue {source.queue!r}") from None
        gone = sorted((one for one in gone if self.has(one)), key=_place)
        if gone:
            log.warning("queue %r: %d messages in hand are no longer in their places", source.queue, len(gone))
        self.lose(gone)
        source.cleared = doubts

    async def _gone(self, api: Api, stream: str, held: list[Delivery]) -> list[Delivery]:
        """Those that are not where they were. A stream loses what is in hand from its end: below the last one that
        is there, all are, or were settled."""
        if not held:
            return []
        state = await api.stream(stream)
        last = 0 if state is None else state["state"]["last_seq"]
        gone = [one for one in held if _place(one) > last]
        rest = sorted((one for one in held if _place(one) <= last), key=_place, reverse=True)
        size = 1
        while rest:
            part, rest = rest[:size], rest[size:]
            found = await api.messages(stream, [{"seq": _place(one)} for one in part])
            for one, message in zip(part, found, strict=True):
                if message is not None and message.stamp == one.token.stamp:
                    return gone
                gone.append(one)
            size = LOOKS
        return gone

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
        if not any(self.has(item.delivery) for item in items):
            return [item.delivery for item in items]
        line = await self._link.line()
        doubtful = {item.delivery.token.source for item in items if self.has(item.delivery)}
        await self.check(line, {source for source in doubtful if source.doubtful})
        ours, lost = self._sift(items)
        done = [item for item in ours if isinstance(item, Ack)]
        moves = [item for item in ours if isinstance(item, Move)]
        releases = [item for item in ours if isinstance(item, Release)]
        work: list[Awaitable[None]] = [self._say(line, [(item.delivery, b"+ACK") for item in done])]
        if moves:
            work.append(self._move(line, moves))
        if releases:
            work.append(self._release(line, releases))
        errors: list[BrokerError] = []
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(outcome, BrokerError):
                errors.append(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
        if errors:
            hopeless = [error for error in errors if not isinstance(error, BrokerUnavailable)]
            raise (hopeless or errors)[0]  # what has nowhere to go is told first: the others need not wait for it
        return lost + [item.delivery for item in ours if item.delivery.lost]

    def _sift(self, items: Sequence[Settlement]) -> tuple[list[Settlement], list[Delivery]]:
        """What is still ours, each once, and the deliveries that are not."""
        self._lapse_some([item.delivery for item in items])
        ours: dict[int, Settlement] = {}
        lost: list[Delivery] = []
        for item in items:
            delivery = item.delivery
            if self.has(delivery) and id(delivery) not in ours:
                ours[id(delivery)] = item
            else:
                lost.append(delivery)
        return list(ours.values()), lost

    def _lapse_some(self, deliveries: Iterable[Delivery]) -> None:
        now = time.monotonic()
        if any(self.has(delivery) and self._is_late(delivery, now) for delivery in deliveries):
            self.lapse()

    async def _say(self, line: Line, verdicts: Sequence[tuple[Delivery, bytes]]) -> None:
        """Tell the server of what is still ours, and hold it no more once that was read."""
        self._lapse_some(delivery for delivery, _ in verdicts)
        verdicts = [verdict for verdict in verdicts if self.has(verdict[0])]
        if not verdicts:
            return
        words = [(delivery.token.source, delivery.token.ack, what) for delivery, what in verdicts]
        failed = await say(line, words, self._link.timeout)
        for delivery, _ in verdicts:
            if self.has(delivery) and delivery.token.source not in failed:
                self._drop(delivery)
        self._end_gone(failed)
        self._changed()
        for error in failed.values():
            raise error

    async def _move(self, line: Line, moves: Sequence[Move]) -> None:
        """Publish first, then acknowledge. Moved again after a doubt it is stored once, for its id says which
        delivery it was."""
        letters = []
        for move in moves:
            token = move.delivery.token
            msg_id = f"{token.source.stream}.{token.stamp}.{token.place}.{token.delivered}"
            letters.append(Letter(move.message, move.to, move.to, msg_id, is_moved=True))
        outcomes = await self._send(letters, line)
        await self._send_bare(line, moves, letters, outcomes)
        moved = [move.delivery for move, outcome in zip(moves, outcomes, strict=True) if outcome is None]
        await self._say(line, [(delivery, b"+ACK") for delivery in moved])
        no_room = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, QueueFull | wire.TooLargeError)]
        stay = [n for n in no_room if _can_stay(moves[n])]
        if stay:
            await self._rewrite(line, [moves[n] for n in stay])
        stuck = [n for n in no_room if n not in stay and isinstance(outcomes[n], wire.TooLargeError)]
        if stuck:
            await self._put_off(line, [(moves[n], outcomes[n]) for n in stuck])
        for n, outcome in enumerate(outcomes):
            if n in stay or n in stuck:
                continue
            if isinstance(outcome, QueueFull):
                raise BrokerUnavailable(f"{outcome}: a message that is to go there waits for room")
            if outcome is not None:
                raise outcome

    async def _send_bare(
        self, line: Line, moves: Sequence[Move], letters: Sequence[Letter], outcomes: list[BrokerError | None]
    ) -> None:
        """What is too large with its history, for others had published it so, goes without headers: but for those
        that say how to read its body."""
        large = [n for n, one in enumerate(outcomes) if isinstance(one, wire.TooLargeError) and not _can_stay(moves[n])]
        bare = [letters[n]._replace(message=_bare(letters[n].message)) for n in large]
        for n, letter, outcome in zip(large, bare, await self._send(bare, line), strict=True):
            if outcome is None:
                log.error("message %s went to %r without its headers: %s", letter.message.id, letter.queue, outcomes[n])
            outcomes[n] = outcome

    async def _put_off(self, line: Line, stuck: Sequence[tuple[Move, BrokerError | None]]) -> None:
        """Not even bare: it stays where it is, and is tried again when somebody may have done something about it."""
        for move, error in stuck:
            log.error(
                "message %s cannot go to %r, and is tried again in %d s: %s", move.delivery.id, move.to, LATER, error
            )
        await self._notes.write(line, [Note(move.delivery, 0, move.delivery.token.rewritten) for move, _ in stuck])
        await self._nak(line, [(move.delivery, LATER) for move, _ in stuck])

    async def _send(self, letters: Sequence[Letter], line: Line) -> list[BrokerError | None]:
        """What became of each. A queue that has gone is made again, if it was declared here."""
        outcomes = await self._publisher.send(letters, line)
        gone = {letter.queue for letter, outcome in zip(letters, outcomes, strict=True) if _is_gone(outcome)}
        revived = set()
        for queue in gone:
            with contextlib.suppress(BrokerError):
                await self._revive(queue)
                revived.add(queue)
        again = [n for n, outcome in enumerate(outcomes) if _is_gone(outcome) and letters[n].queue in revived]
        for n, outcome in zip(again, await self._publisher.send([letters[n] for n in again], line), strict=True):
            outcomes[n] = outcome
        return outcomes

    async def _release(self, line: Line, releases: Sequence[Release]) -> None:
        """A note that cannot be written keeps nothing in hand."""
        given = [item.delivery for item in releases]
        try:
            await self._notes.write(line, [Note(one, one.redelivered, one.token.rewritten) for one in given])
        except BrokerError as error:
            line.check()
            log.warning("what is given back may count as lost: %s", one_line(error))
        await self._nak(line, [(item.delivery, item.delay) for item in releases])

    async def _rewrite(self, line: Line, moves: Sequence[Move]) -> None:
        """Within a queue that has no room for another one, or none so large: it stays where it is, and comes again with
        the headers that are noted."""
        notes = [Note(move.delivery, 0, wire.header_of(move.message, "")) for move in moves]
        await self._notes.write(line, notes)
        await self._nak(line, [(move.delivery, move.message.delay) for move in moves])

    async def _nak(self, line: Line, given: Sequence[tuple[Delivery, float]]) -> None:
        leaving = {id(delivery) for delivery, _ in given}
        self._leaving |= leaving
        try:
            await self._say(line, [(delivery, nak(delay)) for delivery, delay in given])
        finally:
            self._leaving -= leaving

    async def give_back(self, line: Line, deliveries: Iterable[Delivery]) -> None:
        """Uncounted.

        :raises BrokerUnavailable: they come again by themselves.
        """
        releases = [Release(one) for one in deliveries]
        if releases:
            await self._release(line, releases)


def _place(delivery: Delivery) -> int:
    return int(delivery.token.place)


def _is_gone(outcome: BrokerError | None) -> bool:
    return isinstance(outcome, Unroutable)


def _bare(message: Outgoing) -> Outgoing:
    headers = {name: message.headers[name] for name in _READ_BY if name in message.headers}
    return msgspec.structs.replace(message, headers=headers, key=None, reply_to=None)


def _can_stay(move: Move) -> bool:
    """Whether a note can stand for it."""
    delivery, message = move.delivery, move.message
    return move.to == delivery.queue and message.body == delivery.raw and message.id == delivery.id


def nak(delay: float) -> bytes:
    """Give a message back, to be handed out again after so many seconds."""
    return b"-NAK" if delay <= 0 else b'-NAK {"delay": %d}' % round(delay * 1e9)
