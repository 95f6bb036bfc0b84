"""`Bindings`: which queues are bound to a name. They are kept on the server; what we know of them is kept fresh.

A binding is a message whose subject says it all, in a stream that keeps one of each. Whoever publishes remembers
what he has looked up, and hears of every new one: on one server the news of a binding comes before the confirmation
of anything that was published after it had been made. Older knowledge is looked up again beside the publishing, for
in a cluster news may be late.

Whoever unbinds a queue asks all who publish to forget the topic, and waits for their answers. And he leaves a word in
the stream, so that those who declared it do not bind it again when they only see to what may have been lost.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec

from penstock.brokers.base import Queue
from penstock.brokers.nats.api import Api, Refusal, as_ours
from penstock.brokers.nats.everybody import answer, ask_everybody
from penstock.brokers.nats.line import Line, NobodyThereError, ask
from penstock.brokers.nats.names import Names, tail
from penstock.errors import BrokerUnavailable

FRESH = 1.0  # seconds
TOLD_TOGETHER = 100  # topics, within what a server carries

_decode = msgspec.json.Decoder(list[str]).decode


class Bindings:
    """Of one broker. `begin(line)` begins anew with a line; what we forgot is answered to inboxes alone."""

    def __init__(self, names: Names, replicas: int, timeout: float, is_inbox: Callable[[str], bool]) -> None:
        self._names = names
        self._replicas = replicas
        self._timeout = timeout
        self._is_inbox = is_inbox
        self._known: dict[str, tuple[str, ...]] = {}
        self._seen: dict[str, float] = {}
        self._born = ""
        self.news: Counter[str] = Counter()
        """How often the bindings of a name have changed."""

    async def begin(self, line: Line, api: Api) -> None:
        """Listen for news on a new line; what was known may be old."""
        self.forget_all()
        line.listen(self._names.all_bindings, self._hear)

        def unbound(subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
            for topic in _decode(data):
                self.forget(topic)
            if self._is_inbox(reply.decode(errors="replace")):
                answer(line, reply, b"")

        line.listen(self._names.unbound, unbound)
        await self._make(api)

    async def _make(self, api: Api) -> None:
        """Make sure of the stream."""
        try:
            await api.make_stream(
                name=self._names.bindings_stream,
                subjects=[self._names.all_of_bindings],
                max_msgs_per_subject=1,
                num_replicas=self._replicas,
                description="Penstock: which queue is bound to which name",
            )
        except Refusal as refusal:
            raise as_ours(refusal, f"stream {self._names.bindings_stream}") from None

    def forget_all(self) -> None:
        self.news.update(self._known.keys())
        self._known.clear()
        self._seen.clear()

    def forget(self, topic: str) -> None:
        self.news[topic] += 1
        self._known.pop(topic, None)

    def _hear(self, subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
        self.forget(tail(subject.decode())[0])

    async def add(self, line: Line, queue: str, topics: Iterable[str]) -> None:
        """Bind a queue to names, those to which it is not bound yet.

        :raises BrokerUnavailable, BrokerRefused, Refusal: it may not be bound to all of them.
        """
        api = Api(line, self._timeout)
        wanted = list(dict.fromkeys(topics))
        there, unbound = await asyncio.gather(self.of(api, queue), self._unbound(api, queue))
        await self._store(line, [self._names.binding(topic, queue) for topic in wanted if topic not in there])
        await self._remove(api, [self._names.unbinding(topic, queue) for topic in wanted if topic in unbound])

    async def restore(self, line: Line, queue: str, topics: Iterable[str]) -> None:
        """Bind a queue again to those names whose bindings were lost; it stays unbound from others.

        :raises BrokerUnavailable, BrokerRefused, Refusal: it may not be bound to all of them.
        """
        api = Api(line, self._timeout)
        there, unbound = await asyncio.gather(self.of(api, queue), self._unbound(api, queue))
        lost = [topic for topic in dict.fromkeys(topics) if topic not in there and topic not in unbound]
        await self._store(line, [self._names.binding(topic, queue) for topic in lost])

    async def keep(self, line: Line, queues: Iterable[Queue]) -> None:
        """Bind queues again if the stream is not the one that it was the last time.

        :raises BrokerUnavailable, BrokerRefused, Refusal: they may not be bound to all of their names.
        """
        api = Api(line, self._timeout)
        if await self._birth(api) == self._born:
            return
        for queue in queues:
            await self.restore(line, queue.name, (queue.name, *queue.topics))
        self._born = await self._birth(api)

    async def _birth(self, api: Api) -> str:
        """When the stream was made."""
        found = await api.stream(self._names.bindings_stream)
        return "" if found is None else str(found["created"])

    async def take_away(self, line: Line, queue: str, topics: Iterable[str]) -> None:
        """Unbind a queue. When it returns, everybody whose event loop turns publishes accordingly.

        :raises BrokerUnavailable, BrokerRefused, Refusal: it may still be bound to some of them.
        """
        gone = list(topics)
        await self._store(line, [self._names.unbinding(topic, queue) for topic in gone])
        await self._remove(Api(line, self._timeout), [self._names.binding(topic, queue) for topic in gone])
        for topic in gone:
            self.forget(topic)
        told = [msgspec.json.encode(gone[at : at + TOLD_TOGETHER]) for at in range(0, len(gone), TOLD_TOGETHER)]
        await asyncio.gather(*(ask_everybody(line, self._names.unbound, some, lambda _: None) for some in told))

    async def _store(self, line: Line, subjects: Sequence[str]) -> None:
        if subjects:  # where the stream is gone nobody says so: all who publish listen there too
            await self._make(Api(line, self._timeout))
        await asyncio.gather(*(self._store_one(line, subject) for subject in subjects))

    async def _store_one(self, line: Line, subject: str) -> None:
        try:
            said, _ = await ask(line, subject, b"", self._timeout)
        except NobodyThereError:
            raise BrokerUnavailable("the stream of the bindings has gone again") from None
        if b'"error"' in said:
            raise BrokerUnavailable(f"a binding could not be stored: {said.decode(errors='replace')}")

    async def _remove(self, api: Api, subjects: Iterable[str]) -> None:
        stream = self._names.bindings_stream
        await asyncio.gather(*(api.ask(f"STREAM.PURGE.{stream}", {"filter": subject}) for subject in subjects))

    async def of(self, api: Api, queue: str) -> list[str]:
        """The names to which a queue is bound, as the server knows them."""
        found = await api.subjects(self._names.bindings_stream, self._names.bindings_of(queue))
        return [tail(subject)[0] for subject in found]

    async def _unbound(self, api: Api, queue: str) -> list[str]:
        """The names from which a queue was unbound and to which nobody has bound it since."""
        found = await api.subjects(self._names.bindings_stream, self._names.unbindings_of(queue))
        return [tail(subject.removesuffix(".not"))[0] for subject in found]

    async def all(self, api: Api) -> dict[str, list[str]]:
        """The names to which each queue is bound."""
        made: dict[str, list[str]] = {}
        for subject in await api.subjects(self._names.bindings_stream, self._names.all_bindings):
            topic, queue = tail(subject)
            made.setdefault(queue, []).append(topic)
        return made

    def known(self, topic: str) -> tuple[str, ...] | None:
        """The queues bound to a name as far as we know; None: it must be looked up."""
        return self._known.get(topic)

    def is_fresh(self, topic: str) -> bool:
        return asyncio.get_running_loop().time() - self._seen.get(topic, float("-inf")) < FRESH

    async def look_up(self, api: Api, topics: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Ask the server, all in one round trip.

        :raises BrokerUnavailable, BrokerRefused, Refusal: it cannot be asked.
        """
        wanted = list(topics)
        found = await asyncio.gather(*(self._look_up(api, topic) for topic in wanted))
        return dict(zip(wanted, found, strict=True))

    async def _look_up(self, api: Api, topic: str) -> tuple[str, ...]:
        news = self.news[topic]
        subjects = await api.subjects(self._names.bindings_stream, self._names.bound_to(topic))
        queues = tuple(tail(subject)[1] for subject in subjects)
        if news == self.news[topic]:
            if queues:
                self._known[topic] = queues
                self._seen[topic] = asyncio.get_running_loop().time()
            else:
                self._known.pop(topic, None)
        return queues
