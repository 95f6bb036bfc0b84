"""The contract on a SQLite file."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from penstock.brokers.base import Capabilities, OnLost, Queue, QueueInfo, Settlement, to_unbind
from penstock.brokers.sqlite import operations
from penstock.brokers.sqlite.inbox import SqliteInbox, any_awaited, broadcast, reply
from penstock.brokers.sqlite.operations import Bound, Claimed, Membership
from penstock.errors import BrokerError, PublishError, StorageFull
from penstock.message import Delivery, Outgoing
from penstock.sqlite.address import parse_address
from penstock.sqlite.file import DiskFull, SqliteFile, Transaction, soon
from penstock.waiting import Bell

log = logging.getLogger("penstock.sqlite")

T = TypeVar("T")

LOOK = 1.0
"""Seconds between regular looks at the file: for a wake-up that got lost, and for the dead."""


class SqliteBroker:
    """`sqlite:///relative.db` or `sqlite:////absolute.db`, optionally `?vhost=namespace`."""

    capabilities = Capabilities(
        durable=True,
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
        self.path, self.namespace = parse_address(url, vhost)
        self._file: SqliteFile | None = None
        self._subscriptions: list[SqliteSubscription] = []
        self._inboxes: set[SqliteInbox] = set()

    @property
    def admin(self) -> SqliteAdmin:
        return SqliteAdmin(self)

    @property
    def file(self) -> SqliteFile:
        if self._file is None or self._file.orphaned:
            self._file = SqliteFile.lease(self.path)
        return self._file

    async def run(self, work: Callable[[Transaction], T]) -> T:
        """Carry out one operation of `operations`."""
        return await self.file.submit(work)

    async def open(self) -> None:
        await self.file.submit(lambda tx: None, lambda tx: True)

    async def close(self) -> None:
        # All at once: what one releases must not go to the next.
        await asyncio.gather(*(subscription.close() for subscription in self._subscriptions))
        self._subscriptions.clear()
        await asyncio.gather(*(inbox.close() for inbox in self._inboxes))
        file, self._file = self._file, None
        if file is not None:
            await file.drop()

    async def declare(self, queue: Queue) -> None:
        await self.run(lambda tx: operations.declare(tx, self.namespace, queue))

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        try:
            return await self.run(lambda tx: operations.publish(tx, self.namespace, messages))
        except DiskFull as error:
            return [StorageFull(str(error))] * len(messages)

    async def broadcast(self, message: Outgoing) -> None:
        await self.run(lambda tx: broadcast(tx, self.namespace, message))

    async def reply(self, messages: Sequence[Outgoing]) -> None:
        await self.file.submit(
            lambda tx: reply(tx, self.namespace, messages), lambda tx: None if any_awaited(tx, messages) else True
        )

    def inbox(self) -> SqliteInbox:
        inbox = SqliteInbox(self.file, self.namespace, self._inboxes.discard)
        self._inboxes.add(inbox)
        return inbox

    def subscribe(
        self, queues: Sequence[Queue], *, prefetch: int, lease: float, on_lost: OnLost, ahead: bool = True
    ) -> SqliteSubscription:
        subscription = SqliteSubscription(self, [queue.name for queue in queues], prefetch, lease, on_lost)
        self._subscriptions.append(subscription)
        return subscription


class SqliteSubscription:
    """A consumer row in the file, kept alive by heartbeats from the event loop that consumes."""

    def __init__(self, broker: SqliteBroker, names: Sequence[str], prefetch: int, lease: float, on_lost: OnLost):
        self.queue_ids: frozenset[int] = frozenset()
        self._broker = broker
        self._file = broker.file
        self._names = tuple(names)
        self._prefetch = prefetch
        self._lease = lease
        self._on_lost = on_lost
        self._held: dict[int, Delivery] = {}
        self._spare: list[Delivery] = []  # claimed for a `receive` that was cancelled
        self._membership: Membership | None = None
        self._claiming: asyncio.Future[Claimed | None] | None = None
        self._joining: asyncio.Future[Membership] | None = None
        self._bell: Bell | None = None
        self._beating: asyncio.Task[None] | None = None
        self._turn = 0
        self._closed = False

    @property
    def consuming(self) -> bool:
        return self._membership is not None and not self._closed

    def ring(self) -> None:
        if self._bell is not None:
            self._bell.ring_from_thread()

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        while not self._closed:
            if self._membership is None:
                await self._join()
            room = min(limit, self._prefetch - len(self._held) + len(self._spare))
            upcoming: float | None = None
            if room > 0:
                taken, upcoming = await self._take(room)
                if taken:
                    return taken
            left = until - loop.time()
            if left <= 0:
                break
            pause = min(left, LOOK if upcoming is None else min(LOOK, upcoming + 0.001))
            await self._bell.wait(pause)
        return []

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
        membership = self._membership
        held = self._held
        ours = [item for item in items if held.get(item.delivery.token) is item.delivery]
        done = True
        if ours and membership is not None:  # closed: `held` is empty
            settle = partial(operations.settle, namespace=self._broker.namespace, membership=membership, items=ours)
            done = await self._file.submit(settle)
            if done:
                if len(held) >= self._prefetch:
                    self.ring()  # a `receive` may be waiting for room
                for item in ours:
                    held.pop(item.delivery.token, None)
            elif self._membership is membership:
                self._given_up()
        if done and len(ours) == len(items):
            return []
        settled = set(map(id, ours)) if done else set()
        return [item.delivery for item in items if id(item) not in settled]

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._beating is not None:
            self._beating.cancel()
        self._file.listeners.discard(self)
        if self._bell is not None:
            self._bell.ring()
        self._held.clear()
        self._spare.clear()
        try:
            membership = self._membership
            if self._joining is not None:  # `receive` was just beginning
                membership = await soon(self._joining)
            if membership is not None:
                await soon(self._file.submit(partial(operations.leave, consumer=membership.consumer)))
        except BrokerError as error:
            log.warning("could not release what was held, it will be taken over: %s", error)

    async def _join(self) -> None:
        self._file.wake_up.listen()
        join = partial(
            operations.join,
            namespace=self._broker.namespace,
            names=self._names,
            port=self._file.wake_up.port,
            lease=self._lease,
        )
        if self._joining is None:
            self._joining = self._file.submit(join)
        try:
            membership = await asyncio.shield(self._joining)  # cancelled, it stays under way for the next call
        except Exception:
            self._joining = None
            raise
        if self._closed:
            return  # `close` has seen to it
        self._joining = None
        self._membership = membership
        self.queue_ids = frozenset(queue_id for queue_id, _ in membership.queues)
        self._file.listeners.add(self)
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat(), name="penstock-heartbeat")

    async def _take(self, room: int) -> tuple[list[Delivery], float | None]:
        """Messages now in hand, or none and the seconds until a delay ends."""
        if self._spare:
            taken, self._spare = self._spare[:room], self._spare[room:]
            return taken, None
        membership = self._membership
        if membership is None:
            return [], None
        if self._claiming is None:
            self._turn = (self._turn + 1) % len(membership.queues)
            queues = membership.queues[self._turn :] + membership.queues[: self._turn]
            self._claiming = self._file.submit(
                partial(operations.claim, consumer=membership.consumer, queues=queues, limit=room),
                partial(operations.nothing_to_claim, queue_ids=[queue_id for queue_id, _ in queues]),
            )
        claiming = self._claiming
        try:
            claimed = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            if not claiming.done() or claiming.cancelled():
                raise  # it stays under way: the next call comes back to it
            self._keep(claiming, membership)
            raise
        except BaseException:
            self._claiming = None
            raise
        self._claiming = None
        if self._closed or self._membership is not membership:
            return [], None  # closed or given up for dead meanwhile: these went back with the rest
        if claimed is None:
            self._given_up()
            return [], None
        self._held.update((delivery.token, delivery) for delivery in claimed.deliveries)
        if len(claimed.deliveries) > room:  # claimed for an earlier call that asked for more
            self._spare = claimed.deliveries[room:]
        return claimed.deliveries[:room], claimed.upcoming

    def _keep(self, claiming: asyncio.Future[Claimed | None], membership: Membership) -> None:
        """Cancelled at the very moment the claim came in."""
        self._claiming = None
        if claiming.exception() is None and self._membership is membership and not self._closed:
            claimed = claiming.result()
            if claimed is not None:
                self._held.update((delivery.token, delivery) for delivery in claimed.deliveries)
                self._spare += claimed.deliveries

    async def _beat(self) -> None:
        """Say that this loop turns, and look for consumers that no longer do."""
        loop = asyncio.get_running_loop()
        next_beat = loop.time() + self._lease / 3
        complaint = ""
        while True:
            await asyncio.sleep(min(LOOK, self._lease / 3))
            try:
                membership = self._membership
                if membership is not None and loop.time() >= next_beat:
                    beat = partial(operations.beat, consumer=membership.consumer, lease=self._lease)
                    if not await self._file.submit(beat) and self._membership is membership:
                        self._given_up()
                    next_beat = loop.time() + self._lease / 3
                await self._file.submit(operations.take_over, operations.nobody_overdue)
                complaint = ""
            except BrokerError as error:
                if str(error) != complaint:
                    log.warning("no heartbeat: %s", error)
                    complaint = str(error)

    def _given_up(self) -> None:
        """We were silent for too long and everything we held has gone to others: begin a new life."""
        self._membership = None
        self._claiming = None  # what it finds, it finds for the old life
        self._file.listeners.discard(self)
        held, self._held = list(self._held.values()), {}
        self._spare = []
        for delivery in held:
            delivery.lost = True
        if held:
            self._on_lost(held)
        self.ring()


class SqliteAdmin:
    """What an operator may do with the queues of one namespace."""

    def __init__(self, broker: SqliteBroker) -> None:
        self._broker = broker

    async def inspect(self, names: Sequence[str] | None = None) -> Sequence[QueueInfo]:
        every = await self._broker.run(lambda tx: operations.inspect(tx, self._broker.namespace))
        return every if names is None else [info for info in every if info.name in names]

    async def browse(self, queue: str, limit: int, after: Any = None) -> tuple[list[Delivery], Any]:
        return await self._broker.run(
            lambda tx: operations.browse(tx, self._find(tx, queue).id, queue, limit, after or 0)
        )

    async def purge(self, queue: str) -> int:
        return await self._broker.run(lambda tx: operations.purge(tx, self._find(tx, queue).id))

    async def pause(self, queue: str, paused: bool) -> None:
        await self._broker.run(lambda tx: operations.pause(tx, self._find(tx, queue).id, paused))

    async def unbind(self, queue: str, topics: Sequence[str]) -> None:
        unbound = to_unbind(queue, topics)
        namespace = self._broker.namespace
        await self._broker.run(lambda tx: operations.unbind(tx, namespace, self._find(tx, queue).id, unbound))

    def _find(self, tx: Transaction, name: str) -> Bound:
        queue = operations.find_queue(tx, self._broker.namespace, name)
        if queue is None:
            raise BrokerError(f"there is no queue {name!r}")
        return queue
