"""The operator's side: what the server tells of streams and consumers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from penstock.brokers.base import QueueInfo, to_unbind
from penstock.brokers.nats import wire
from penstock.brokers.nats.api import Api, Consumer, Message, Refusal, as_ours
from penstock.brokers.nats.names import can_be_named, name_of, tail
from penstock.errors import BrokerError, Unsupported
from penstock.message import Delivery

if TYPE_CHECKING:
    from penstock.brokers.nats.broker import NatsBroker

TOGETHER = 32
"""Messages that are looked at in one round trip."""
PAGE = 500
"""Messages that a purge takes at a time."""


class _Look(NamedTuple):
    """A queue as the server sees it."""

    name: str
    messages: int
    consumer: Consumer | None


class NatsAdmin:
    """The server counts what it has handed out together with what waits for the end of a delay or to be handed out
    again. While there is any of that, the consumers are asked what they hold."""

    def __init__(self, broker: NatsBroker) -> None:
        self._broker = broker
        self._names = broker.names

    async def _api(self) -> Api:
        return Api(await self._broker.link.line(), self._broker.link.timeout)

    async def inspect(self, names: Sequence[str] | None = None) -> Sequence[QueueInfo]:
        api = await self._api()
        try:
            bound = await self._broker.bindings.all(api)
            wanted = await self._all(api) if names is None else names
            seen = await asyncio.gather(*(self._look(api, name) for name in sorted(set(wanted)) if name))
            looks = [look for look in seen if look is not None]
            some = any(look.consumer is not None and look.consumer.held for look in looks)
            count = await self._broker.headcount.take(api.line) if some else {}
            return [await self._info(api, look, bound, count) for look in looks]
        except Refusal as refusal:
            raise as_ours(refusal, "looking at queues") from None

    async def _all(self, api: Api) -> list[str]:
        """The names of all queues of our space."""
        names: list[str] = []
        while True:
            question = {"offset": len(names), "subject": f"{self._names.space}.q.*.*"}
            page = (await api.ask("STREAM.LIST", question)).get("streams") or []
            names += [
                name_of(subject.rpartition(".")[2]) for one in page for subject in one["config"].get("subjects", ())[:1]
            ]
            if not page:
                return names

    async def _look(self, api: Api, name: str) -> _Look | None:
        stream = self._names.stream(name)
        found, consumer = await asyncio.gather(api.stream(stream), api.consumer(stream))
        return None if found is None else _Look(name, found["state"]["messages"], consumer)

    async def _info(
        self, api: Api, look: _Look, bound: Mapping[str, list[str]], count: Mapping[str, tuple[int, int]]
    ) -> QueueInfo:
        held, consumers = count.get(look.name, (0, 0))
        held = min(held, look.messages)
        oldest = None
        if look.messages > held:
            first = 0 if look.consumer is None or not held else look.consumer.delivered
            oldest = await self._age(api, look.name, first + 1)
        return QueueInfo(
            name=look.name,
            ready=look.messages - held,
            unsettled=held,
            consumers=consumers if count else None,
            oldest=oldest,
            expired=None,
            discarded=None,
            bindings=tuple(sorted(bound.get(look.name, ()))),
        )

    async def _age(self, api: Api, name: str, seq: int) -> float | None:
        """When the first message from a place on was published."""
        stream = self._names.stream(name)
        found = await api.message(stream, seq=seq, next_by_subj=self._names.subjects(name))
        return None if found is None else _shown(found, name).enqueued_at

    async def browse(self, queue: str, limit: int, after: Any = None) -> tuple[list[Delivery], Any]:
        api = await self._api()
        stream, subjects = self._names.stream(queue), self._names.subjects(queue)
        try:
            if await api.stream(stream) is None:
                raise BrokerError(f"there is no queue {queue!r}")
            page: list[Delivery] = []
            seq = 1 if after is None else int(after) + 1
            while True:
                found = await api.message(stream, seq=seq, next_by_subj=subjects)
                if found is None:
                    return page, None
                if len(page) == limit:
                    break
                wanted = min(limit - len(page) - 1, TOGETHER)
                near = await api.messages(stream, [{"seq": found.seq + 1 + n} for n in range(wanted)])
                page += [_shown(one, queue) for one in (found, *near) if one is not None]
                seq = found.seq + 1 + wanted
            return page, seq - 1
        except Refusal as refusal:
            raise as_ours(refusal, f"browsing {queue!r}") from None

    async def purge(self, queue: str) -> int:
        """By taking and acknowledging: so it leaves what consumers hold, and what waits for the end of a delay that
        somebody has seen."""
        api = await self._api()
        try:
            if await api.stream(self._names.stream(queue)) is None:
                raise BrokerError(f"there is no queue {queue!r}")
        except Refusal as refusal:
            raise as_ours(refusal, f"purging {queue!r}") from None
        return await self._broker.clear(queue, PAGE)

    async def unbind(self, queue: str, topics: Sequence[str]) -> None:
        unbound = [topic for topic in to_unbind(queue, topics) if can_be_named(topic)]
        line = await self._broker.link.line()
        api = Api(line, self._broker.link.timeout)
        try:
            if not can_be_named(queue) or await api.stream(self._names.stream(queue)) is None:
                raise BrokerError(f"there is no queue {queue!r}")
            await self._broker.bindings.take_away(line, queue, unbound)
        except Refusal as refusal:
            raise as_ours(refusal, f"unbinding {queue!r}") from None
        self._broker.forget_topics(queue, unbound)

    async def pause(self, queue: str, paused: bool) -> None:
        raise Unsupported("NATS cannot pause a queue: stop its consumers instead")


def _shown(found: Message, queue: str) -> Delivery:
    """A message that is looked at, not taken."""
    delivery = wire.to_delivery(found.subject.encode(), found.body, found.block, queue)
    if delivery.topic == found.subject:
        delivery.topic = tail(found.subject)[0]
    if not delivery.id:
        delivery.id = f"{found.seq}"
    return delivery
