"""The contract on PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock.brokers.base import Capabilities, OnLost, Queue
from penstock.brokers.declared import Declared
from penstock.brokers.postgres.admin import PostgresAdmin
from penstock.brokers.postgres.encoding import meta_of
from penstock.brokers.postgres.heart import Heart
from penstock.brokers.postgres.inbox import PostgresInbox, inbox_of
from penstock.brokers.postgres.publishing import arguments, outcomes, publish_within
from penstock.brokers.postgres.sql import Statements
from penstock.brokers.postgres.subscription import PostgresSubscription
from penstock.brokers.postgres.waker import Waker
from penstock.errors import BrokerError, PublishError, QueueMismatch, StorageFull
from penstock.message import Outgoing
from penstock.postgres.address import parse_address
from penstock.postgres.errors import DiskFull, translate_within
from penstock.postgres.listener import Listener
from penstock.postgres.pool import Pool
from penstock.waiting import Gathering, together

if TYPE_CHECKING:
    from asyncpg import Connection, Record

log = logging.getLogger("penstock.postgres")


class PostgresBroker:
    """`postgresql://user:password@host:5432/database`, or `postgres://…`.

    Options by URL query: `schema` (`penstock`), `connections` (4 at most for work, made as they are needed, beside
    one that listens and one for heartbeats), `timeout` (10 seconds for a connection), and the driver's own: `host` for
    a socket's folder, `sslmode`, `sslrootcert`, `sslcert`, `sslkey`, `application_name`, `passfile`,
    `target_session_attrs`, …. A `vhost` is a schema.
    """

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
        transactions=True,
    )

    def __init__(self, url: str, *, vhost: str | None = None) -> None:
        self.address = parse_address(url, vhost)
        self.statements = Statements(self.address.schema)
        self.pool = Pool(self.address)
        self.listener = Listener(self.address, self._back)
        self.heart = Heart(self.pool, self.statements)
        self.waker = Waker(self.pool, self.statements, self._ring)
        self.outbox: Gathering[Outgoing, PublishError | None] = Gathering(self.publish)
        self._declared = Declared()
        self._subscriptions: set[PostgresSubscription] = set()
        self._inboxes: set[PostgresInbox] = set()

    @property
    def admin(self) -> PostgresAdmin:
        return PostgresAdmin(self)

    async def open(self) -> None:
        self.pool.open()
        self.heart.open()
        self.waker.open()
        if self.listener.closed:
            self.listener = Listener(self.address, self._back)
        await self.pool.run(lambda connection: connection.execute("SELECT 1"))

    async def close(self) -> None:
        try:
            # All at once: what one releases must not go to the next.
            await asyncio.gather(*(subscription.close() for subscription in tuple(self._subscriptions)))
            await asyncio.gather(*(inbox.close() for inbox in tuple(self._inboxes)))
            await self.heart.close()
            await self.pool.idle()  # what is under way may have something to tell
            await self.waker.close()
        finally:
            await together(self.heart.close, self.listener.close, self.pool.close)

    async def declare(self, queue: Queue) -> None:
        await self._declare(queue)
        self._declared.add(queue)

    def forget_topics(self, name: str, topics: Sequence[str]) -> None:
        """They are not to be bound again unless they are declared again."""
        self._declared.forget_topics(name, topics)

    async def declare_again(self, name: str) -> bool:
        """Make those queues again that were declared here and have gone, with their schema say; whether `name` is one
        of them."""
        if name not in self._declared:
            return False

        async def look(connection: Connection) -> list[Record]:
            return await connection.fetch(self.statements.known, list(self._declared))

        known = {row["name"] for row in await self.pool.run(look)}
        for queue in self._declared.in_order():
            if queue.name not in known:
                await self._declare(queue)
        return True

    async def _declare(self, queue: Queue) -> None:
        async def declare(connection: Connection) -> Record | None:
            return await connection.fetchrow(
                self.statements.declare,
                queue.name,
                list(queue.topics),
                queue.ordered,
                queue.lane_of,
                queue.max_length,
            )

        row = await self.pool.run(declare)
        assert row is not None
        if row["ordered"] != queue.ordered:
            raise QueueMismatch(f"queue {queue.name!r} exists with ordered={row['ordered']}")

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        if not messages:
            return []
        told = self.waker.closed  # nobody would tell of it later
        given = arguments(messages, told)

        async def publish(connection: Connection) -> Record:
            row = await connection.fetchrow(self.statements.publish, *given)
            assert row is not None
            if not told:  # here, so that `close`, which waits for this, waits for the telling too
                urgent = any(message.priority for message in messages)
                self.waker.tell(row["fresh"], row["fresh"] if urgent else ())
            return row

        try:
            row = await self.pool.run(publish)
        except DiskFull as error:
            return [StorageFull(str(error))] * len(messages)
        return outcomes(messages, row)

    async def publish_within(self, messages: Sequence[Outgoing], transaction: Any) -> Sequence[PublishError | None]:
        """See `Transactional`. `transaction`: a connection of asyncpg or psycopg 3, in a transaction."""
        if not messages:
            return []
        try:
            return await publish_within(self.statements, messages, transaction)
        except (BrokerError, TypeError, ValueError):
            raise
        except Exception as error:
            raise translate_within(error, self.address.schema) from error

    async def broadcast(self, message: Outgoing) -> None:
        meta = meta_of(message)
        await self.pool.run(
            lambda connection: connection.execute(self.statements.broadcast, message.topic, meta, message.body)
        )

    async def reply(self, messages: Sequence[Outgoing]) -> None:
        sent = [(inbox, message) for message in messages if (inbox := inbox_of(message.topic)) is not None]
        if not sent:
            return
        inboxes = [inbox for inbox, _ in sent]
        metas = [meta_of(message) for _, message in sent]
        bodies = [message.body for _, message in sent]
        await self.pool.run(lambda connection: connection.execute(self.statements.reply, inboxes, metas, bodies))

    def inbox(self) -> PostgresInbox:
        inbox = PostgresInbox(self)
        self._inboxes.add(inbox)
        return inbox

    def subscribe(
        self, queues: Sequence[Queue], *, prefetch: int, lease: float, on_lost: OnLost, ahead: bool = True
    ) -> PostgresSubscription:
        subscription = PostgresSubscription(self, [queue.name for queue in queues], prefetch, lease, on_lost)
        self._subscriptions.add(subscription)
        return subscription

    async def hear(self) -> None:
        """From now on consumers of this connection are told of what is new.

        :raises BrokerUnavailable: call again later.
        """
        await self.listener.listen(f"penstock:{self.address.schema}", self._heard)

    def forget(self, subscription: PostgresSubscription) -> None:
        """It is closed."""
        self._subscriptions.discard(subscription)

    def forget_inbox(self, inbox: PostgresInbox) -> None:
        """It is closed."""
        self._inboxes.discard(inbox)

    def _heard(self, payload: str) -> None:
        if payload == "*":
            self._back()
            return
        fresh, _, back = payload.partition(";")
        with contextlib.suppress(ValueError):  # anybody may notify
            self._ring({int(id) for id in fresh.split(",") if id}, {int(id) for id in back.split(",") if id})

    def _ring(self, fresh: set[int], back: set[int]) -> None:
        for subscription in self._subscriptions:
            subscription.ring(fresh, back)

    def _back(self) -> None:
        """Anything may have gone unheard."""
        for subscription in self._subscriptions:
            subscription.look()
        for inbox in self._inboxes:
            inbox.look()
