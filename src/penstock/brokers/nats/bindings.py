"""`Bindings`: which queues are bound to a name. They are kept on the server; what we know of them is kept fresh.

A binding is a message whose subject says it all, in a stream that keeps one of each. Whoever publishes remembers
what he has looked up, and hears of every new one: on one server the news of a binding comes before the confirmation
of anything that was published after it had been made. Older knowledge is looked up again beside the publishing, for
in a cluster news may be late.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from penstock.brokers.nats.api import Api, Refusal, as_ours
from penstock.brokers.nats.line import Line, NobodyThereError, ask
from penstock.brokers.nats.names import Names, tail
from penstock.errors import BrokerUnavailable

FRESH = 1.0  # seconds


class Bindings:
    """Of one broker. `line(line)` begins anew with a line."""

    def __init__(self, names: Names, replicas: int, timeout: float) -> None:
        self._names = names
        self._replicas = replicas
        self._timeout = timeout
        self._known: dict[str, tuple[str, ...]] = {}
        self._seen: dict[str, float] = {}
        self.news: Counter[str] = Counter()
        """How often the bindings of a name have changed."""

    async def begin(self, line: Line, api: Api) -> None:
        """Listen for news on a new line; what was known may be old."""
        self.forget_all()
        line.listen(self._names.all_bindings, self._hear)
        try:
            await api.make_stream(
                name=self._names.bindings_stream,
                subjects=[self._names.all_bindings],
                max_msgs_per_subject=1,
                num_replicas=self._replicas,
                description="Penstock: which queue is bound to which name",
            )
        except Refusal as refusal:
            if await api.stream(self._names.bindings_stream) is None:
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
        there = set(await self.of(api, queue))
        missing = [topic for topic in dict.fromkeys(topics) if topic not in there]
        await asyncio.gather(*(self._add(line, topic, queue) for topic in missing))

    async def _add(self, line: Line, topic: str, queue: str) -> None:
        try:
            answer, _ = await ask(line, self._names.binding(topic, queue), b"", self._timeout)
        except NobodyThereError:
            raise BrokerUnavailable("the stream of the bindings is gone: connect again") from None
        if b'"error"' in answer:
            raise BrokerUnavailable(f"a binding could not be stored: {answer.decode(errors='replace')}")

    async def of(self, api: Api, queue: str) -> list[str]:
        """The names to which a queue is bound, as the server knows them."""
        found = await api.subjects(self._names.bindings_stream, self._names.bindings_of(queue))
        return [tail(subject)[0] for subject in found]

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
        if queues and news == self.news[topic]:
            self._known[topic] = queues
            self._seen[topic] = asyncio.get_running_loop().time()
        return queues
