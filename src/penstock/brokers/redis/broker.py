"""The contract on a Redis server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import msgspec

from penstock.brokers.base import Capabilities, OnLost, Queue
from penstock.brokers.declared import Declared
from penstock.brokers.redis import lua, wire
from penstock.brokers.redis.admin import RedisAdmin
from penstock.brokers.redis.inbox import RedisInbox
from penstock.brokers.redis.subscription import RedisSubscription
from penstock.errors import PublishError, QueueFull, QueueMismatch, StorageFull, Unroutable
from penstock.message import Outgoing
from penstock.redis.address import parse_address
from penstock.redis.checks import Keeping, survey
from penstock.redis.errors import NoRoom
from penstock.redis.line import Word
from penstock.redis.link import Link, Script
from penstock.redis.listening import Listening

log = logging.getLogger("penstock.redis")

ROOM = "penstock"
MAX_WORDS = 2**20
"""Of one command; Redis 6.2 takes no more."""
MAX_BATCH = 512 * 2**20
"""Bytes in one script; the server breaks off a connection at 1 GiB."""


class RedisBroker:
    """`redis://user:password@host:port/database`, optionally `?vhost=namespace`."""

    capabilities = Capabilities(
        durable=False,  # until the server has said that it is
        atomic_move=True,
        atomic_publish=True,
        fenced=True,
        max_lease=None,
        priorities=256,
        delay=True,
        expiry=True,
        ordered=True,
        topics=True,
        browse=True,
        pause=True,
        lists=True,
        sees_delayed=True,
        exact_length=True,
    )

    def __init__(self, url: str, *, vhost: str | None = None) -> None:
        self.address = parse_address(url, vhost)
        self.prefix = self.address.prefix(ROOM)
        self.channels = self.address.channels(ROOM)
        self.link = Link(self.address)
        self.listening = Listening(self.link)
        self._keeping = Keeping()
        self._declared = Declared()
        self._subscriptions: set[RedisSubscription] = set()
        self._inboxes: set[RedisInbox] = set()

    @property
    def admin(self) -> RedisAdmin:
        return RedisAdmin(self)

    async def run(self, script: Script, *arguments: Word) -> object:
        """Carry out one script of `lua`."""
        return await self.link.run(script, self.prefix, self.channels, *arguments)

    async def open(self) -> None:
        self._keeping = await survey(self.link)
        self.capabilities = msgspec.structs.replace(type(self).capabilities, durable=self._keeping.durable)

    async def close(self) -> None:
        try:
            # All at once: what one releases must not go to the next.
            await asyncio.gather(*(subscription.close() for subscription in tuple(self._subscriptions)))
            self._subscriptions.clear()
            await asyncio.gather(*(inbox.close() for inbox in tuple(self._inboxes)))
            self._inboxes.clear()
        finally:
            self.link.close()
            try:
                await self.listening.close()
            finally:
                self.link.close()  # it may have connected again meanwhile

    async def declare(self, queue: Queue) -> None:
        self._keeping.warn(self.address.name)
        await self._declare(queue, again=False)
        self._declared.add(queue)

    async def _declare(self, queue: Queue, *, again: bool) -> None:
        """`again`: nobody asks for it anew, so what it was unbound from stays unbound."""
        topics = dict.fromkeys((queue.name, *queue.topics))
        limit = "" if queue.max_length is None else queue.max_length
        lane_of = queue.lane_of or ""
        said = await self.run(lua.DECLARE, queue.name, int(queue.ordered), lane_of, limit, int(again), *topics)
        if said:
            raise QueueMismatch(f"queue {queue.name!r} exists with ordered={said == b'1'}")

    def forget_topics(self, name: str, topics: Sequence[str]) -> None:
        """They are not to be bound again unless they are declared again."""
        self._declared.forget_topics(name, topics)

    async def declare_again(self, name: str | None = None) -> bool:
        """Make all queues again that were declared here, in a database that may have been emptied; whether `name`
        is one of them."""
        if name is not None and name not in self._declared:
            return False
        for queue in self._declared.in_order():
            try:
                await self._declare(queue, again=True)
            except QueueMismatch as error:
                if queue.name == name:
                    raise
                log.warning("%s", error)
        return True

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        if not messages:
            return []
        arguments: list[Word] = []
        for message in messages:
            arguments += wire.stored(message)
        words = wire.packed(arguments, MAX_WORDS - 10)
        longest = len(words[0]) if len(words) == 1 else 0  # type: ignore[arg-type]
        if max(longest, sum(len(message.body) for message in messages)) > MAX_BATCH:
            too_much = PublishError(f"a batch of over {MAX_BATCH >> 20} MiB: publish it in parts")
            return [too_much] * len(messages)
        try:
            refused = await self.run(lua.PUBLISH, *words)
        except NoRoom as error:
            return [StorageFull(str(error))] * len(messages)
        outcomes: list[PublishError | None] = [None] * len(messages)
        assert isinstance(refused, list)
        for index, full, limit in refused:
            outcomes[index] = QueueFull(full.decode(), limit) if full else Unroutable(messages[index].topic)
        return outcomes

    async def broadcast(self, message: Outgoing) -> None:
        await self.link.call("PUBLISH", f"{self.channels}topic:{message.topic}", wire.encode_spoken(message))

    async def reply(self, messages: Sequence[Outgoing]) -> None:
        await asyncio.gather(
            *(
                self.link.call("PUBLISH", f"{self.channels}inbox:{one.topic}", wire.encode_spoken(one))
                for one in messages
            )
        )

    def inbox(self) -> RedisInbox:
        inbox = RedisInbox(self, self._inboxes.discard)
        self._inboxes.add(inbox)
        return inbox

    def subscribe(
        self, queues: Sequence[Queue], *, prefetch: int, lease: float, on_lost: OnLost, ahead: bool = True
    ) -> RedisSubscription:
        names = [queue.name for queue in queues]
        subscription = RedisSubscription(self, names, prefetch, lease, on_lost, self._subscriptions.discard)
        self._subscriptions.add(subscription)
        return subscription
