"""The contract on RabbitMQ."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from penstock.brokers.amqp import topology
from penstock.brokers.amqp.admin import AmqpAdmin
from penstock.brokers.amqp.inbox import AmqpInbox
from penstock.brokers.amqp.link import CONNECT_TIMEOUT, Link
from penstock.brokers.amqp.publisher import Publisher
from penstock.brokers.amqp.replies import Replier
from penstock.brokers.amqp.requests import Ways
from penstock.brokers.amqp.subscription import AmqpSubscription
from penstock.brokers.base import Capabilities, OnLost, Queue
from penstock.config import URL, parse_url
from penstock.errors import ConfigError, PublishError, Unsupported
from penstock.message import Outgoing
from penstock.waiting import together

log = logging.getLogger("penstock.amqp")

DEFAULT_PORTS = {"amqp": 5672, "amqps": 5671}

_OPTIONS = {"queue_type": str, "heartbeat": int, "consumer_timeout": float, "timeout": float, "vhost": str}
_DRIVER_OPTIONS = ("auth", "cadata", "cafile", "capath", "certfile", "keyfile", "name", "no_verify_ssl")
_HEARTBEATS = range(1, 65_535)  # 0 would mean none: a dead line would never be noticed


class AmqpBroker:
    """`amqp://user:password@host:5672/vhost`, `amqps://…`.

    Options by URL query: `queue_type` (`quorum` or `classic`, of the queues it makes), `heartbeat` (10
    seconds), `timeout` (10 seconds for a connection), `consumer_timeout` (the server's, in seconds, if it
    is not 1800), and the driver's own: `cafile`, `certfile`, `keyfile`, `no_verify_ssl`, `auth`, `name`, ….
    """

    def __init__(self, url: str, *, vhost: str | None = None) -> None:
        parts = parse_url(url)
        options = parts.options({**_OPTIONS, **dict.fromkeys(_DRIVER_OPTIONS, str)}, parts.scheme)
        self.queue_type = options.get("queue_type", "quorum")
        if self.queue_type not in ("quorum", "classic"):
            raise ConfigError(f"queue_type must be quorum or classic, not {self.queue_type!r}")
        options.setdefault("heartbeat", 10)
        if options["heartbeat"] not in _HEARTBEATS:
            raise ConfigError(f"heartbeat must be 1 to {_HEARTBEATS[-1]} seconds, not {options['heartbeat']}")
        timeout = options.get("timeout", CONNECT_TIMEOUT)
        driver_url = _driver_url(parts, vhost if vhost is not None else options.get("vhost"), options)
        # One connection each: the server stops reading from publishers when it is short of memory.
        self.publishing = Link(driver_url, url, timeout)
        self.consuming = Link(driver_url, url, timeout)
        self.queues: dict[str, Queue] = {}
        """Those declared here, by name."""
        self.limited: set[str] = set()
        """The names to which one of them is bound that may be full."""
        self.ways = Ways()
        self.publisher = Publisher(self.publishing, self.queues)
        self._replier = Replier(self.publishing, lambda: Link(driver_url, url, timeout))
        self.capabilities = Capabilities(
            durable=True,
            atomic_move=False,
            atomic_publish=False,
            fenced=False,
            max_lease=options.get("consumer_timeout", 1800.0),
            priorities=topology.MOST_LEVELS,
            delay=True,
            expiry=True,
            ordered=False,
            topics=True,
            browse=False,
            pause=False,
            lists=False,
            sees_delayed=False,
            exact_length=False,
            releases_in_place=False,
        )
        self._subscriptions: list[AmqpSubscription] = []
        self._inboxes: set[AmqpInbox] = set()

    @property
    def admin(self) -> AmqpAdmin:
        return AmqpAdmin(self)

    async def open(self) -> None:
        await self.publisher.open()

    async def close(self) -> None:
        for subscription in self._subscriptions:
            subscription.stop()  # none of them takes what another one gives back
        try:
            await asyncio.gather(*(subscription.close() for subscription in tuple(self._subscriptions)))
            await asyncio.gather(*(inbox.close() for inbox in self._inboxes))
        finally:
            await together(self.consuming.close, self.publishing.close)

    async def declare(self, queue: Queue) -> None:
        if queue.ordered:
            raise Unsupported("RabbitMQ keeps no order by key: ordered=True needs sqlite or memory")
        topology.check(queue)
        complaint = await topology.ensure_queue(self.publishing, queue, self.queue_type)
        if complaint is not None and self.queues.get(queue.name) != queue:
            log.warning("queue %r exists with other arguments and is used as it is: %s", queue.name, complaint)
        self.queues[queue.name] = queue
        for name in (queue.name, *queue.topics):
            self.ways.forget(name)
            if queue.max_length is not None:
                self.limited.add(name)

    def forget_topics(self, name: str, topics: Sequence[str]) -> None:
        """They are not to be bound again unless they are declared again."""
        queue = self.queues.get(name)
        if queue is not None:
            kept = tuple(topic for topic in queue.topics if topic not in topics)
            self.queues[name] = msgspec.structs.replace(queue, topics=kept)

    async def revive(self, name: str, *, deleted: bool) -> None:
        """Make sure that a queue is there to be consumed: one of ours may have gone with a node, or been deleted.

        Where it is there, its bindings are left as they are, for it may have been unbound; unless it was `deleted`
        and made anew, perhaps by somebody who declared less.

        On the connection for consuming, which the server still reads from when it is short of memory.

        :raises BrokerUnavailable: it is not there, and was not declared here.
        """
        queue = self.queues.get(name)
        if queue is None:
            await topology.look_for(self.consuming, name)
        elif deleted or not await topology.is_reached(self.consuming, name):
            await topology.ensure_queue(self.consuming, queue, self.queue_type)

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        return await self.publisher.publish(messages)

    async def broadcast(self, message: Outgoing) -> None:
        await self.publisher.broadcast(message)

    async def reply(self, messages: Sequence[Outgoing]) -> None:
        """As the contract says; an address that is no inbox's is taken for the name of a queue, as that of
        somebody who does not use Penstock may be."""
        await self._replier.send(messages)

    def inbox(self) -> AmqpInbox:
        inbox = AmqpInbox(self, self._inboxes.discard)
        self._inboxes.add(inbox)
        return inbox

    def subscribe(
        self, queues: Sequence[Queue], *, prefetch: int, lease: float, on_lost: OnLost, ahead: bool = True
    ) -> AmqpSubscription:
        names = [queue.name for queue in queues]
        subscription = AmqpSubscription(self, names, prefetch, on_lost, ahead)
        self._subscriptions.append(subscription)
        return subscription

    def forget(self, subscription: AmqpSubscription) -> None:
        """It is closed."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)


def _driver_url(parts: URL, vhost: str | None, options: dict[str, Any]) -> str:
    name = parts.path[1:] if vhost is None else vhost.strip("/")
    user, password = parts.user or "guest", parts.password or "guest"
    query = {key: options[key] for key in _DRIVER_OPTIONS if key in options}
    query["heartbeat"] = options["heartbeat"]
    host = parts.host or "127.0.0.1"
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    return (
        f"{parts.scheme}://{quote(user, safe='')}:{quote(password, safe='')}@{host}:{port}"
        f"/{quote(name or '/', safe='')}?{urlencode(query)}"
    )
