"""`Publisher`: confirmed publishing, with an outcome for every message."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from penstock.brokers.nats import api, wire
from penstock.brokers.nats.api import Api, Refusal
from penstock.brokers.nats.bindings import Bindings
from penstock.brokers.nats.line import Line
from penstock.brokers.nats.link import Link
from penstock.brokers.nats.names import Names, can_be_named
from penstock.errors import (
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    PublishError,
    QueueFull,
    Unroutable,
)
from penstock.message import RESERVED, Outgoing

TOGETHER = 1000
"""Messages whose confirmations are awaited at the same time."""
BYTES_TOGETHER = 8 * 2**20
"""Bytes of bodies for which the same holds."""
SOON = 500_000
"""Bytes of bodies after which is seen whether the line is full."""
ELECTION = 5.0
"""Seconds for which a stream that does not answer, but is there, is tried again."""
ELECTION_PAUSE = 0.1  # seconds
HEADROOM = 32 * 1024
"""Bytes of headers that are kept for what is written to a message later: its history, its traceback."""


class Letter(NamedTuple):
    """A message for one queue."""

    message: Outgoing
    topic: str
    queue: str
    msg_id: str | None = None
    """The server stores one of an id within its duplicate window."""
    is_moved: bool = False
    """It was taken before: it may use the room that is kept for that."""


class SilentError(BrokerUnavailable):
    """Nobody listens to the subject of a queue: its stream is gone, or between two leaders."""


class _Batch:
    """What became of letters that were sent together: an outcome each."""

    def __init__(self, publisher: Publisher, letters: Sequence[Letter]) -> None:
        self._publisher = publisher
        self._letters = letters
        self.outcomes: list[BrokerError | None] = [None] * len(letters)
        self.left = len(letters)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self, number: int, payload: bytes, block: bytes | None) -> None:
        error: BrokerError | None = None
        if block is not None or not payload.startswith(b'{"stream'):
            error = self._publisher.outcome(self._letters[number], payload, block)
        self._settle(number, error)

    def refused(self, number: int, error: Exception) -> None:
        if isinstance(error, BrokerRefused):
            error = PublishError(str(error))
        self._settle(number, error if isinstance(error, BrokerError) else BrokerUnavailable(str(error)))

    def _settle(self, number: int, error: BrokerError | None) -> None:
        self.outcomes[number] = error
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)


def _parts(messages: Sequence[Outgoing]) -> Iterator[Sequence[Outgoing]]:
    """So many together as are awaited at the same time."""
    begin = size = 0
    for number, message in enumerate(messages):
        if number > begin and (number - begin >= TOGETHER or size + len(message.body) > BYTES_TOGETHER):
            yield messages[begin:number]
            begin, size = number, 0
        size += len(message.body)
    if begin < len(messages):
        yield messages[begin:]


def _msg_id(message: Outgoing) -> str:
    """The id; with a mark of what the engine has written to the message, which makes of a resend another message."""
    ours = sorted((name, str(value)) for name, value in message.headers.items() if name.startswith(RESERVED))
    return f"{message.id}-{hashlib.sha256(repr(ours).encode()).hexdigest()[:16]}" if ours else message.id


class Publisher:
    """Publishes over `link`; `limits` has the lengths of queues declared here, by name."""

    def __init__(self, link: Link, names: Names, bindings: Bindings, limits: Mapping[str, int], dedup: bool) -> None:
        self._link = link
        self._names = names
        self._bindings = bindings
        self._limits = limits
        self._dedup = dedup

    async def publish(self, messages: Sequence[Outgoing]) -> list[PublishError | None]:
        """One copy to every queue bound to the topic.

        :raises BrokerUnavailable, BrokerRefused: nothing is known to be stored.
        """
        outcomes: list[PublishError | None] = []
        for part in _parts(messages):
            for outcome in await self._publish(part):
                if outcome is not None and not isinstance(outcome, PublishError):
                    raise outcome
                outcomes.append(outcome)
        return outcomes

    async def _publish(self, messages: Sequence[Outgoing]) -> list[BrokerError | None]:
        line = await self._link.line()
        ask = Api(line, self._link.timeout)
        topics = dict.fromkeys(message.topic for message in messages if can_be_named(message.topic))
        try:
            routes = await self._routes(ask, topics)
            news = {topic: self._bindings.news[topic] for topic in routes}
            looking = self._look_again(ask, routes)
            try:
                outcomes = await self._to_all(line, messages, routes)
                if looking is not None:
                    await looking
            finally:
                if looking is not None and not looking.done():
                    looking.cancel()
            changed = [topic for topic in routes if self._bindings.news[topic] != news[topic]]
            if changed or looking is not None:
                await self._to_the_new(line, ask, messages, routes, changed, outcomes)
        except Refusal as refusal:
            raise api.as_ours(refusal, "looking for the queues of a name") from None
        return outcomes

    async def _routes(self, ask: Api, topics: Mapping[str, None]) -> dict[str, tuple[str, ...]]:
        routes: dict[str, tuple[str, ...]] = {}
        unknown = []
        for topic in topics:
            queues = self._bindings.known(topic)
            if queues is None:
                unknown.append(topic)
            else:
                routes[topic] = queues
        if unknown:
            routes.update(await self._bindings.look_up(ask, unknown))
        return routes

    def _look_again(
        self, ask: Api, routes: Mapping[str, tuple[str, ...]]
    ) -> asyncio.Future[dict[str, tuple[str, ...]]] | None:
        """Beside the publishing, at what was looked up a while ago."""
        old = [topic for topic, queues in routes.items() if queues and not self._bindings.is_fresh(topic)]
        if not old:
            return None
        looking = asyncio.ensure_future(self._bindings.look_up(ask, old))
        looking.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever waits is told
        return looking

    async def _to_all(
        self, line: Line, messages: Sequence[Outgoing], routes: Mapping[str, tuple[str, ...]]
    ) -> list[BrokerError | None]:
        outcomes: list[BrokerError | None] = [None] * len(messages)
        letters: list[Letter] = []
        whose: list[int] = []
        for index, message in enumerate(messages):
            queues = routes.get(message.topic)
            if not queues:
                outcomes[index] = Unroutable(message.topic)
                continue
            for queue in queues:
                letters.append(Letter(message, message.topic, queue, _msg_id(message) if self._dedup else None))
                whose.append(index)
        await self._note(line, letters, whose, outcomes)
        return outcomes

    async def _note(
        self, line: Line, letters: Sequence[Letter], whose: Sequence[int], outcomes: list[BrokerError | None]
    ) -> None:
        """Send, and put each error where its message's outcome is. That a queue is gone is none while there is
        another."""
        stored, gone = set[int](), dict[int, BrokerError]()
        for index, outcome in zip(whose, await self.send(letters, line), strict=True):
            if outcome is None:
                stored.add(index)
            elif isinstance(outcome, Unroutable):
                gone[index] = outcome
                self._bindings.forget(outcome.name)
            elif outcomes[index] is None:
                outcomes[index] = outcome
        for index, outcome in gone.items():
            if index not in stored and outcomes[index] is None:
                outcomes[index] = outcome

    async def _to_the_new(
        self,
        line: Line,
        ask: Api,
        messages: Sequence[Outgoing],
        routes: Mapping[str, tuple[str, ...]],
        changed: Sequence[str],
        outcomes: list[BrokerError | None],
    ) -> None:
        """To the queues that have been bound since we looked."""
        now = await self._routes(ask, dict.fromkeys(changed))
        now.update({topic: self._bindings.known(topic) or () for topic in routes if topic not in now})
        letters: list[Letter] = []
        whose: list[int] = []
        for index, message in enumerate(messages):
            for queue in now.get(message.topic, ()):
                if queue not in routes[message.topic]:
                    letters.append(Letter(message, message.topic, queue, _msg_id(message) if self._dedup else None))
                    whose.append(index)
                    if isinstance(outcomes[index], Unroutable):
                        outcomes[index] = None
        if letters:
            await self._note(line, letters, whose, outcomes)

    async def send(self, letters: Sequence[Letter], line: Line | None = None) -> list[BrokerError | None]:
        """Each into its queue; what became of each.

        :raises BrokerUnavailable, BrokerRefused: nothing is known of some of them.
        """
        if not letters:
            return []
        line = line or await self._link.line()
        outcomes = await self._send(line, letters)
        until = time.monotonic() + ELECTION
        while again := await self._to_try_again(line, letters, outcomes):
            if time.monotonic() > until:
                break
            await asyncio.sleep(ELECTION_PAUSE)
            for number, outcome in zip(again, await self._send(line, [letters[n] for n in again]), strict=True):
                outcomes[number] = outcome
        return outcomes

    async def _to_try_again(
        self, line: Line, letters: Sequence[Letter], outcomes: list[BrokerError | None]
    ) -> list[int]:
        """Those whose stream did not answer and is there all the same; where it is not, they are unroutable."""
        silent = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, SilentError)]
        queues = list({letters[number].queue for number in silent})
        ask = Api(line, self._link.timeout)
        found = await asyncio.gather(*(self._is_there(ask, queue) for queue in queues))
        there = dict(zip(queues, found, strict=True))
        for number in silent:
            if not there[letters[number].queue]:
                outcomes[number] = Unroutable(letters[number].topic)
        return [number for number in silent if there[letters[number].queue]]

    async def _is_there(self, ask: Api, queue: str) -> bool:
        """Only a server that says so is believed that a stream is not."""
        try:
            return await ask.stream(self._names.stream(queue)) is not None
        except (Refusal, BrokerError):
            return True

    async def _send(self, line: Line, letters: Sequence[Letter]) -> list[BrokerError | None]:
        batch = _Batch(self, letters)
        now = time.time()
        size = 0
        try:
            for number, letter in enumerate(letters):
                self._write(line, batch, number, letter, now)
                size += len(letter.message.body)
                if number % 100 == 99 or size > SOON:
                    size = 0
                    await self._room(line)
            await self._confirmed(batch)
        finally:
            if batch.left:
                line.give_up(batch)
        return batch.outcomes

    async def _room(self, line: Line) -> None:
        try:
            async with asyncio.timeout(self._link.timeout):
                await line.room()
        except TimeoutError:
            raise BrokerUnavailable("the server takes nothing more") from None

    async def _confirmed(self, batch: _Batch) -> None:
        """Wait for as long as there are confirmations."""
        while batch.left:
            before = batch.left
            await asyncio.wait({batch.done}, timeout=self._link.timeout)
            if batch.left == before:
                raise BrokerUnavailable("publishing was not confirmed in time")

    def _write(self, line: Line, batch: _Batch, number: int, letter: Letter, now: float) -> None:
        message = letter.message
        try:
            block = wire.header_of(message, letter.topic, letter.msg_id, now)
            room = 0 if letter.is_moved else min(HEADROOM, line.largest // 4)
            size = len(block) + len(message.body)
            if size > line.largest - room:
                raise wire.TooLargeError(
                    size,
                    line.largest - room,
                    f"message {message.id[:80]!r} takes {size} bytes, of which this server carries {line.largest}, "
                    f"{room} of them kept for its history: raise its max_payload",
                )
            if len(block) > wire.MOST_HEADERS - room:
                raise wire.TooLargeError(
                    len(block),
                    wire.MOST_HEADERS - room,
                    f"id, key and headers take {len(block)} bytes, of which NATS carries {wire.MOST_HEADERS}, "
                    f"{room} of them kept for the message's history",
                )
        except PublishError as error:
            batch.refused(number, error)
            return
        subject = self._names.subject(letter.topic, letter.queue)
        reply = line.expect(batch, number, subject)
        try:
            line.write(wire.publication(subject, reply, block, message.body))
        except BrokerUnavailable as error:
            line.drop(reply)
            batch.refused(number, error)

    def outcome(self, letter: Letter, payload: bytes, block: bytes | None) -> BrokerError | None:
        """What an answer says that is no plain confirmation."""
        status = wire.status_of(block)
        if status is not None and status[0] == 503:
            return SilentError(f"the stream of queue {letter.queue!r} does not answer")
        refusal = api.refusal_in(payload)
        if refusal is None:
            return None if payload.startswith(b'{"stream') else PublishError("the server's answer is not understood")
        if refusal.number == api.STORE_FAILED and "maximum messages" in refusal.text:
            return QueueFull(letter.queue, self._limits.get(letter.queue, 0))
        error = api.as_ours(refusal, "publishing")
        if isinstance(error, BrokerUnavailable):
            return error
        return api.publish_error(refusal, repr(letter.topic))
