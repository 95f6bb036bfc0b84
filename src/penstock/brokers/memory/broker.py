"""The contract in memory: brokers, consumers and inboxes of a `MemoryServer`."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from penstock.brokers.base import INBOX_SIZE, Capabilities, OnLost, OnRefused, Queue, QueueInfo, Settlement, to_unbind
from penstock.brokers.memory.server import Address, MemoryServer, as_delivery, decode
from penstock.config import parse_url
from penstock.errors import BrokerError, BrokerUnavailable, PublishError
from penstock.message import Delivery, Outgoing
from penstock.waiting import Bell

_servers: dict[str, MemoryServer] = {}


class MemoryBroker:
    """One user of a `MemoryServer`."""

    capabilities = Capabilities(
        durable=False,
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

    def __init__(self, url: str = "memory://", *, vhost: str | None = None, server: MemoryServer | None = None) -> None:
        parts = parse_url(url)
        options = parts.options({"vhost": str}, "memory")
        name = (parts.host or "") + parts.path
        if server is None:
            server = _servers.setdefault(name, MemoryServer()) if name else MemoryServer()
        self.server = server
        self.namespace = (vhost if vhost is not None else options.get("vhost", "")).strip("/")
        self._subscriptions: list[MemorySubscription] = []
        self._inboxes: set[MemoryInbox] = set()

    @property
    def admin(self) -> MemoryAdmin:
        return MemoryAdmin(self)

    async def open(self) -> None:
        pass  # there is nothing to connect to

    async def close(self) -> None:
        for subscription in tuple(self._subscriptions):
            await subscription.close()
        self._subscriptions.clear()
        for inbox in tuple(self._inboxes):
            await inbox.close()

    async def declare(self, queue: Queue) -> None:
        self.server.declare(self.namespace, queue)

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        return self.server.publish(self.namespace, messages)

    async def broadcast(self, message: Outgoing) -> None:
        self.server.broadcast(self.namespace, [message])

    async def reply(self, messages: Sequence[Outgoing]) -> None:
        self.server.broadcast(self.namespace, messages)

    def inbox(self) -> MemoryInbox:
        inbox = MemoryInbox(self.server, self.namespace, self._inboxes.discard)
        self._inboxes.add(inbox)
        return inbox

    def subscribe(
        self, queues: Sequence[Queue], *, prefetch: int, lease: float, on_lost: OnLost, ahead: bool = True
    ) -> MemorySubscription:
        subscription = MemorySubscription(
            self.server, [(self.namespace, queue.name) for queue in queues], prefetch, lease, on_lost
        )
        self._subscriptions.append(subscription)
        return subscription


class MemorySubscription:
    """A consumer: alive while its event loop turns, like any other system's."""

    def __init__(
        self, server: MemoryServer, addresses: Iterable[Address], prefetch: int, lease: float, on_lost: OnLost
    ) -> None:
        self.addresses = tuple(addresses)
        self._server = server
        self._prefetch = prefetch
        self._lease = lease
        self._on_lost = on_lost
        self._held: dict[int, Delivery] = {}
        self._turn = 0
        self._bell: Bell | None = None
        self._beating: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def consuming(self) -> bool:
        return self in self._server.consumers

    def ring(self) -> None:
        if self._bell is not None:
            self._bell.ring_from_thread()

    def next_addresses(self) -> tuple[Address, ...]:
        """The queues, beginning with another one each time, so that none starves."""
        self._turn = (self._turn + 1) % len(self.addresses)
        return self.addresses[self._turn :] + self.addresses[: self._turn]

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        if self._bell is None and not self._closed:
            self._check_declared()
            self._bell = Bell()
            self._beating = asyncio.create_task(self._beat())
            self._enter()
        clock = self._server.clock
        until = clock.monotonic() + wait
        while not self._closed:
            room = min(limit, self._prefetch - len(self._held))
            taken = self._server.claim(self, room) if room > 0 and self.consuming else []
            if taken:
                self._held.update((delivery.token, delivery) for delivery in taken)
                return taken
            left = until - clock.monotonic()
            if left <= 0:
                break
            upcoming = self._server.next_event()
            assert self._bell is not None
            await self._bell.wait(left if upcoming is None else min(left, max(upcoming, 0.001)))
        return []

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
        ours = [item for item in items if self._held.get(item.delivery.token) is item.delivery]
        lost = self._server.settle(self, ours)
        if len(ours) < len(items):
            lost += [item.delivery for item in items if self._held.get(item.delivery.token) is not item.delivery]
        if ours and not self.consuming:
            self._given_up()
        for item in ours:
            self._held.pop(item.delivery.token, None)
        if self._bell is not None:
            self._bell.ring()
        return lost

    async def close(self) -> None:
        self._closed = True
        if self._beating is not None:
            self._beating.cancel()
        self._server.forget(self, counted=False)
        self._held.clear()
        if self._bell is not None:
            self._bell.ring()

    def _check_declared(self) -> None:
        for address in self.addresses:
            if address not in self._server.lines:
                raise BrokerError(f"cannot consume {address[1]!r}: it is not declared")

    def _enter(self) -> None:
        with self._server.lock:
            self._server.consumers[self] = self._server.clock.monotonic() + self._lease

    async def _beat(self) -> None:
        """Say that we are alive."""
        while True:
            await asyncio.sleep(self._lease / 3)
            with self._server.lock:
                self._server.sweep()
                if self.consuming:
                    self._enter()
                    continue
            self._given_up()

    def _given_up(self) -> None:
        """We were silent for too long and everything we held has gone to others: begin a new life."""
        held, self._held = list(self._held.values()), {}
        for delivery in held:
            delivery.lost = True
        self._enter()
        if held:
            self._on_lost(held)
        self.ring()


class MemoryInbox:
    """A listener among those of its server."""

    def __init__(self, server: MemoryServer, namespace: str, forget: Callable[[MemoryInbox], None]) -> None:
        self.address = uuid.uuid4().hex
        """Where replies go."""
        self.addresses: frozenset[Address] = frozenset({(namespace, self.address)})
        """All that it hears."""
        self.life = 0
        self._server = server
        self._namespace = namespace
        self._forget = forget
        self._arrived: deque[bytes] = deque(maxlen=INBOX_SIZE)
        self._bell: Bell | None = None
        self._closed = False

    def put(self, data: bytes) -> None:
        self._arrived.append(data)
        if self._bell is not None:
            self._bell.ring_from_thread()

    async def listen(self, topics: frozenset[str]) -> None:
        with self._server.lock:
            self.addresses = frozenset((self._namespace, topic) for topic in {*topics, self.address})
            self._enter()

    async def request(self, message: Outgoing, refused: OnRefused) -> None:
        if self._closed:
            raise BrokerUnavailable("the inbox is closed")
        self._enter()
        request = msgspec.structs.replace(message, reply_to=self.address)
        [refusal] = self._server.publish(self._namespace, [request])
        if refusal is not None:
            refused(refusal)

    async def receive(self, wait: float) -> list[Delivery]:
        if self._bell is None:
            self._bell = Bell()
        clock = self._server.clock
        until = clock.monotonic() + wait
        while not self._arrived and not self._closed and (left := until - clock.monotonic()) > 0:
            await self._bell.wait(left)  # it may have been rung for what was fetched already
        with self._server.lock:
            arrived = [as_delivery(decode(data), queue="", redelivered=0, token=None) for data in self._arrived]
            self._arrived.clear()
        return arrived

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.life += 1
        with self._server.lock:
            self._server.inboxes.pop(self, None)
        self._forget(self)
        if self._bell is not None:
            self._bell.ring()

    def _enter(self) -> None:
        with self._server.lock:
            if not self._closed:
                self._server.inboxes[self] = None


class MemoryAdmin:
    """What an operator may do with the queues of one namespace."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._server, self._namespace = broker.server, broker.namespace

    async def inspect(self, names: Sequence[str] | None = None) -> Sequence[QueueInfo]:
        every = self._server.inspect(self._namespace)
        return every if names is None else [info for info in every if info.name in names]

    async def browse(self, queue: str, limit: int, after: Any = None) -> tuple[list[Delivery], Any]:
        return self._server.browse(self._address(queue), limit, after or 0)

    async def purge(self, queue: str) -> int:
        return self._server.purge(self._address(queue))

    async def pause(self, queue: str, paused: bool) -> None:
        self._server.pause(self._address(queue), paused)

    async def unbind(self, queue: str, topics: Sequence[str]) -> None:
        unbound = to_unbind(queue, topics)
        self._server.unbind(self._address(queue), unbound)

    def _address(self, queue: str) -> Address:
        address = (self._namespace, queue)
        if address not in self._server.lines:
            raise BrokerError(f"there is no queue {queue!r}")
        return address
