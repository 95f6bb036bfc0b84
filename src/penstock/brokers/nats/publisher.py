"""`Publisher`: confirmed publishing, with an outcome for every message."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
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
from penstock.message import Outgoing

TOGETHER = 1000
"""Messages whose confirmations are awaited at the same time."""


class Letter(NamedTuple):
    """A message for one queue."""

    message: Outgoing
    topic: str
    queue: str
    msg_id: str | None = None
    """The server stores one of an id within its duplicate window."""


class _Batch:
    """What became of letters that were sent together: an outcome each."""

    def __init__(self, publisher: Publisher, letters: Sequence[Letter]) -> None:
        self._publisher = publisher
        self._letters = letters
        self.outcomes: list[BrokerError | None] = [None] * len(letters)
        self._left = len(letters)
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
        self._left -= 1
        if not self._left and not self.done.done():
            self.done.set_result(None)

    def unknown(self, error: BrokerError) -> None:
        """Nothing more is heard of those that were not answered."""
        if self._left and not self.done.done():
            self.done.set_exception(error)


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
        for start in range(0, len(messages), TOGETHER):
            part = messages[start : start + TOGETHER]
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
            outcomes = await self._to_all(line, messages, routes)
            if looking is not None:
                await looking
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

    def _look_again(self, ask: Api, routes: Mapping[str, tuple[str, ...]]) -> asyncio.Future[object] | None:
        """Beside the publishing, at what was looked up a while ago."""
        old = [topic for topic, queues in routes.items() if queues and not self._bindings.is_fresh(topic)]
        return asyncio.ensure_future(self._bindings.look_up(ask, old)) if old else None

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
                letters.append(Letter(message, message.topic, queue, message.id if self._dedup else None))
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
                    letters.append(Letter(message, message.topic, queue, message.id if self._dedup else None))
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
        batch = _Batch(self, letters)
        now = time.time()
        try:
            async with asyncio.timeout(self._link.timeout + len(letters) / 500):
                for number, letter in enumerate(letters):
                    self._write(line, batch, number, letter, now)
                    if number % 100 == 99:
                        await line.room()
                await batch.done
        except TimeoutError:
            raise BrokerUnavailable("publishing was not confirmed in time") from None
        finally:
            if not batch.done.done() or batch.done.cancelled():
                line.give_up(batch)
        return batch.outcomes

    def _write(self, line: Line, batch: _Batch, number: int, letter: Letter, now: float) -> None:
        message = letter.message
        try:
            block = wire.header_of(message, letter.topic, letter.msg_id, now)
            size = len(block) + len(message.body)
            if size > line.largest:
                raise PublishError(
                    f"message {message.id[:80]!r} takes {size} bytes, of which this server carries {line.largest}: "
                    "raise its max_payload"
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
            return Unroutable(letter.topic)
        refusal = api.refusal_in(payload)
        if refusal is None:
            return None if payload.startswith(b'{"stream') else PublishError("the server's answer is not understood")
        if refusal.number == api.STORE_FAILED and "maximum messages" in refusal.text:
            return QueueFull(letter.queue, self._limits.get(letter.queue, 0))
        error = api.as_ours(refusal, "publishing")
        if isinstance(error, BrokerUnavailable):
            return error
        return api.publish_error(refusal, repr(letter.topic))
