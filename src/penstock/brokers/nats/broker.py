"""The contract on NATS JetStream."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec

from penstock.brokers.base import Ack, Capabilities, OnLost, Queue
from penstock.brokers.nats import names as naming
from penstock.brokers.nats import wire
from penstock.brokers.nats.admin import NatsAdmin
from penstock.brokers.nats.api import Api, Refusal, as_ours
from penstock.brokers.nats.bindings import Bindings
from penstock.brokers.nats.headcount import Count, Headcount
from penstock.brokers.nats.inbox import NatsInbox
from penstock.brokers.nats.line import Line
from penstock.brokers.nats.link import OPTIONS, Link
from penstock.brokers.nats.names import Names
from penstock.brokers.nats.news import Item, News
from penstock.brokers.nats.notes import Notes
from penstock.brokers.nats.publisher import Publisher
from penstock.brokers.nats.source import DEFAULT_LEASE
from penstock.brokers.nats.subscription import NatsSubscription
from penstock.config import parse_url
from penstock.errors import BrokerError, BrokerUnavailable, ConfigError, PublishError, QueueMismatch, Unsupported
from penstock.message import Outgoing

log = logging.getLogger("penstock.nats")

DUPLICATE_WINDOW = 120.0
"""Seconds within which the server stores one message of an id."""

LOOK = 10.0
"""Seconds between looks of who consumes whether its queues are still bound: somebody may have deleted the bindings."""

_OPTIONS = {**OPTIONS, "vhost": str, "replicas": int, "dedup": bool, "duplicate_window": float}
_SPACE = re.compile(r"[A-Za-z0-9_-]{1,40}")


class NatsBroker:
    """`nats://user:password@host:4222/space`, `nats://token@host`, `tls://…`.

    A space is a prefix of subjects and streams, `penstock` unless said otherwise. Options by URL query: `replicas` (1)
    of the streams it makes, `dedup` (false: whether a message whose id was published to a queue within
    `duplicate_window`, 120 seconds, is stored once), `timeout` (10 seconds for a connection or an answer), `servers`
    (others of the cluster, `host:port,host:port`), `creds` (a file of a token and a seed), `nkeys_seed` (a seed, or a
    file that holds one), and the driver's own: `ping_interval` (10 seconds), `token`, `cafile`, `certfile`, `keyfile`,
    `tls_hostname`, `tls_first`, `inbox_prefix`, `name`.
    """

    def __init__(self, url: str, *, vhost: str | None = None) -> None:
        parts = parse_url(url)
        options = parts.options(_OPTIONS, parts.scheme)
        space = vhost if vhost is not None else options.get("vhost", parts.path)
        self.names = Names(_checked_space(space.strip("/") or "penstock"))
        self._replicas = _within(options, "replicas", 1, 5, 1)
        self._window = _within(options, "duplicate_window", 0.1, 7 * 24 * 3600.0, DUPLICATE_WINDOW)
        for name, default in (("timeout", 10.0), ("ping_interval", 10.0)):
            _within(options, name, 0.01, 3600.0, default)
        self.link = Link(url, parts, options, self._begin)
        self.queues: dict[str, Queue] = {}
        """Those declared here, by name."""
        self._limits: dict[str, int] = {}
        self.bindings = Bindings(self.names, self._replicas, self.link.timeout, self._is_inbox)
        self.notes = Notes(self.names, self._replicas, self.link.timeout)
        self.headcount = Headcount(self.names, self._held, self._is_inbox)
        self.news = News(self.names, self._hear)
        dedup = options.get("dedup", False)
        self.publisher = Publisher(self.link, self.names, self.bindings, self._limits, dedup)
        self.capabilities = Capabilities(
            durable=True,
            durable_with="sync_interval: always",
            atomic_move=False,
            atomic_publish=False,
            fenced=False,
            max_lease=None,
            priorities=0,
            delay=True,
            expiry=False,
            ordered=False,
            topics=True,
            browse=True,
            pause=False,
            lists=True,
            sees_delayed=False,
            exact_length=False,
        )
        self._inbox_prefix = f"{options.get('inbox_prefix', '_INBOX')}."
        self._subscriptions: list[NatsSubscription] = []
        self._inboxes: set[NatsInbox] = set()
        self._look_at = time.monotonic() + LOOK
        self._looking: asyncio.Task[None] | None = None

    @property
    def admin(self) -> NatsAdmin:
        return NatsAdmin(self)

    async def open(self) -> None:
        await self.link.line()

    async def _begin(self, line: Line) -> None:
        """What a new line needs before anybody uses it."""
        api = Api(line, self.link.timeout)
        if not line.proven:  # who leads a cluster may be away, and those who lead the streams here
            await api.check()
        await self.bindings.begin(line, api)
        await self.notes.begin(api)
        self.headcount.begin(line)
        self.news.begin(line)
        await line.flush(self.link.timeout)
        for subscription in self._subscriptions:
            subscription.doubt()

    async def close(self) -> None:
        for subscription in self._subscriptions:
            subscription.stop()  # none of them takes what another one gives back
        try:
            await asyncio.gather(*(subscription.close() for subscription in tuple(self._subscriptions)))
            for inbox in tuple(self._inboxes):
                await inbox.close()
            self._inboxes.clear()
        finally:
            if self._looking is not None:
                self._looking.cancel()
            await self.link.close()

    def _hear(self, item: Item) -> None:
        for subscription in self._subscriptions:
            subscription.hear(item)

    def _is_inbox(self, address: str) -> bool:
        """Whether it is one that somebody hears whose prefix is ours."""
        return address.startswith(self._inbox_prefix) and re.fullmatch(r"[!-~]{1,200}", address) is not None

    def _held(self) -> Count:
        """What our subscriptions hold."""
        held: Count = {}
        for subscription in self._subscriptions:
            for queue, count in subscription.holding().items():
                before = held.get(queue, (0, 0))
                held[queue] = (before[0] + count, before[1] + 1)
        return held

    # -- queues

    async def declare(self, queue: Queue) -> None:
        if queue.ordered:
            raise Unsupported("NATS keeps no order by key: ordered=True needs sqlite or memory")
        naming.check(queue.name, *queue.topics)
        await self._make_sure(queue, self.bindings.add)
        self.queues[queue.name] = queue

    async def _make_sure(self, queue: Queue, bind: Callable[[Line, str, Iterable[str]], Awaitable[None]]) -> None:
        line = await self.link.line()
        try:
            await self._make(Api(line, self.link.timeout), queue)
            await bind(line, queue.name, (queue.name, *queue.topics))
        except Refusal as refusal:
            raise as_ours(refusal, f"queue {queue.name!r}") from None

    def forget_topics(self, name: str, topics: Sequence[str]) -> None:
        """They are not to be bound again unless they are declared again."""
        queue = self.queues.get(name)
        if queue is not None:
            kept = tuple(topic for topic in queue.topics if topic not in topics)
            self.queues[name] = msgspec.structs.replace(queue, topics=kept)

    async def _make(self, api: Api, queue: Queue) -> None:
        """The stream first, which keeps what nobody consumes yet; only what is bound is published to it."""
        stream = self.names.stream(queue.name)
        made = await api.make_stream(
            name=stream,
            subjects=[self.names.subjects(queue.name)],
            retention="workqueue",
            discard="new",
            max_msgs=-1 if queue.max_length is None else queue.max_length,
            num_replicas=self._replicas,
            duplicate_window=round(self._window * 1e9),
            description=f"Penstock: queue {queue.name}"[:1000],
        )
        if made:
            self.news.tell(api.line, Item(queue.name))
        config = await self._existing(api, queue, stream)
        if config["max_msgs"] > 0:
            self._limits[queue.name] = config["max_msgs"]
        if await api.consumer(stream) is None:
            await api.make_consumer(stream, DEFAULT_LEASE)

    async def _existing(self, api: Api, queue: Queue, stream: str) -> dict[str, Any]:
        """The stream as it is.

        :raises QueueMismatch: it is no queue of ours.
        """
        found = await api.stream(stream)
        if found is None:
            raise BrokerUnavailable(f"the stream of queue {queue.name!r} has gone again")
        config: dict[str, Any] = found["config"]
        ours = {"retention": "workqueue", "subjects": [self.names.subjects(queue.name)], "discard": "new"}
        for key, value in ours.items():
            if config.get(key) != value:
                raise QueueMismatch(
                    f"stream {stream} exists and is no queue of ours: its {key} is {config.get(key)!r}, not {value!r}"
                )
        limit = config["max_msgs"] if config["max_msgs"] > 0 else None
        is_news = self.queues.get(queue.name) != queue
        if config["num_replicas"] < self._replicas and is_news:
            log.warning(
                "queue %r exists with %d replicas and is used as it is, not with %d",
                queue.name,
                config["num_replicas"],
                self._replicas,
            )
        if limit != queue.max_length and is_news:
            log.warning(
                "queue %r exists with max_length %s and is used as it is, not with %s",
                queue.name,
                limit,
                queue.max_length,
            )
        return config

    async def revive(self, name: str) -> None:
        """Make a queue again that has been deleted.

        :raises BrokerUnavailable: it is not there, and was not declared here.
        """
        queue = self.queues.get(name)
        if queue is None:
            raise BrokerUnavailable(f"there is no queue {name!r}")
        await self._make_sure(queue, self.bindings.restore)

    def look(self) -> None:
        """For consumers to call as they turn: what was declared here is kept bound."""
        now = time.monotonic()
        if now > self._look_at and self._looking is None:
            self._look_at = now + LOOK
            self._looking = asyncio.create_task(self._look(), name="penstock-nats-bindings")

    async def _look(self) -> None:
        try:
            await self.bindings.keep(await self.link.line(), tuple(self.queues.values()))
        except (BrokerError, Refusal) as error:
            log.debug("the bindings could not be looked at: %s", error)
        finally:
            self._looking = None

    async def clear(self, queue: str, page: int) -> int:
        """Take and acknowledge all that is there; how much that was."""
        removed = 0
        subscription = NatsSubscription(self, [queue], page, None, lambda _: None, ahead=False, sorts=False)
        self._subscriptions.append(subscription)
        try:
            while taken := await subscription.receive(page, 0):
                removed += len(taken) - len(await subscription.settle([Ack(one) for one in taken]))
        finally:
            await subscription.close()
        return removed

    # -- publishing

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        return await self.publisher.publish(messages)

    async def broadcast(self, message: Outgoing) -> None:
        if not naming.can_be_named(message.topic):
            return  # nobody can listen to it
        line = await self.link.line()
        self._send(line, self.names.broadcast(message.topic), message)
        await line.flush(self.link.timeout)

    async def reply(self, messages: Sequence[Outgoing]) -> None:
        line = await self.link.line()
        for message in messages:
            address = message.topic
            if not self._is_inbox(address):
                log.warning(
                    "a reply was not sent: %.100r is no inbox under %s (inbox_prefix must be the same on both sides)",
                    address,
                    self._inbox_prefix,
                )
                continue
            try:
                self._send(line, address, message)
            except PublishError as error:
                log.warning("a reply was not sent: %s", error)
        await line.room()

    def _send(self, line: Line, subject: str, message: Outgoing) -> None:
        """To whoever listens."""
        block = wire.header_of(message, subject)  # with its topic, where that is not the subject itself
        if len(block) + len(message.body) > line.largest:
            size = len(block) + len(message.body)
            raise PublishError(f"{size} bytes are more than the {line.largest} that this server carries (max_payload)")
        line.write(wire.publication(subject, b"", block, message.body))

    def inbox(self) -> NatsInbox:
        inbox = NatsInbox(self, self._inboxes.discard)
        self._inboxes.add(inbox)
        return inbox

    # -- consuming

    def subscribe(
        self, queues: Sequence[Queue], *, prefetch: int, lease: float, on_lost: OnLost, ahead: bool = True
    ) -> NatsSubscription:
        names = [queue.name for queue in queues]
        subscription = NatsSubscription(self, names, prefetch, lease, on_lost, ahead)
        self._subscriptions.append(subscription)
        return subscription

    def forget(self, subscription: NatsSubscription) -> None:
        """It is closed."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)


def _checked_space(space: str) -> str:
    if not _SPACE.fullmatch(space):
        raise ConfigError(f"a space on NATS has up to 40 letters, digits, _ and -: not {space!r}")
    return space


def _within(options: dict[str, Any], name: str, least: Any, most: Any, default: Any) -> Any:
    value = options.get(name, default)
    if not least <= value <= most:
        raise ConfigError(f"{name} must be {least} to {most}, not {value}")
    return value
