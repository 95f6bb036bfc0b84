"""One consumer: a row with a deadline, kept alive by heartbeats from the event loop that consumes."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.brokers.base import Ack, Move, OnLost, Release, Settlement
from penstock.brokers.claims import Claimed, Claims, under_way
from penstock.brokers.postgres.encoding import columns, deliveries
from penstock.errors import BrokerError, BrokerUnavailable
from penstock.message import Delivery
from penstock.postgres.errors import NotBegun
from penstock.waiting import Bell

if TYPE_CHECKING:
    from asyncpg import Connection, Record

    from penstock.brokers.postgres.broker import PostgresBroker

log = logging.getLogger("penstock.postgres")

LOOK = 10.0  # seconds between looks for what nobody told of: whoever published it has died before it could
FROM_THE_START = 1.0  # seconds for which places that were passed may be passed over
MOST_BYTES = 64 * 2**20  # bodies in one answer, about


@dataclasses.dataclass(eq=False)
class Membership:
    """One life of a subscription: from joining until it leaves or is given up for dead."""

    consumer: int
    names: dict[int, str]
    """Of its queues, by their ids."""
    ordered: frozenset[int]
    ticket: int = 0
    """With which it claims."""
    unsure: bool = False
    """Nobody knows whether a claim with that was carried out, or still will be."""


class Floors:
    """In each queue the place up to which it was emptied. Claims begin there: rows that have been taken leave their
    index entries behind until the next vacuum, and stepping over a million of those takes as long as all the rest."""

    def __init__(self) -> None:
        self._passed: dict[int, int] = {}
        self._since = 0.0

    def of(self, queues: Sequence[int]) -> list[int]:
        now = time.monotonic()
        if now - self._since > FROM_THE_START:
            self._passed.clear()
            self._since = now
        return [self._passed.get(queue, 0) for queue in queues]

    def passed(self, queue: int, place: int) -> None:
        self._passed[queue] = max(place, self._passed.get(queue, 0))

    def forget(self, queues: set[int]) -> None:
        for queue in queues:
            self._passed.pop(queue, None)


class PostgresSubscription:
    """See `Subscription`. Messages are claimed by the hundred, settled by the hundred."""

    def __init__(self, broker: PostgresBroker, names: Sequence[str], prefetch: int, lease: float, on_lost: OnLost):
        self.lease = lease
        self._broker = broker
        self._pool = broker.pool
        self._sql = broker.statements
        self._names = tuple(dict.fromkeys(names))
        self._claims = Claims(prefetch, on_lost)
        self._held: dict[int, Delivery] = self._claims.held
        self._on_lost = on_lost
        self._unanswered: set[int] = set()  # settled, but the line broke before we heard of it
        self._membership: Membership | None = None
        self._joining: asyncio.Task[Membership] | None = None
        self._floors = Floors()
        self._bell: Bell | None = None
        self._turn = 0
        self._down = False
        self._closing: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def consuming(self) -> bool:
        return self._membership is not None and self._broker.listener.connected and not (self._down or self._closed)

    @property
    def life(self) -> int | None:
        return None if self._membership is None else self._membership.consumer

    def ring(self, fresh: set[int], back: set[int]) -> None:
        """Something is new in these queues, or came back."""
        membership = self._membership
        if membership is None:
            return
        if not back.isdisjoint(membership.names):
            self._floors.forget(back)
        elif fresh.isdisjoint(membership.names):
            return
        self.look()

    def look(self) -> None:
        """Anything may be new."""
        if self._bell is not None:
            self._bell.ring()

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        while not self._closed:
            try:
                if self._membership is None:
                    await self._join()
                room = min(limit, self._claims.room)
                taken: list[Delivery] = []
                upcoming: float | None = None
                if room > 0:
                    taken, upcoming = await self._take(room)
            except BrokerError:
                self._down = True
                raise
            self._down = False
            if taken:
                return taken
            left = until - loop.time()
            if left <= 0:
                break
            await self._bell.wait(min(left, LOOK if upcoming is None else min(LOOK, upcoming + 0.001)))
        return []

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
        membership, held = self._membership, self._held
        ours = self._claims.ours(items)
        strangers = (
            []
            if len(ours) == len(items)
            else [i.delivery for i in items if held.get(i.delivery.token) is not i.delivery]
        )
        if not ours or membership is None:  # closed: nothing is ours
            return [item.delivery for item in items] if membership is None else strangers
        settling = _Settling(membership, ours, self._sql.settle)
        try:
            row = await self._pool.run(settling)
            if row["missing"] is not None and await self._broker.declare_again(row["missing"]):
                row = await self._pool.run(settling)
        except BrokerUnavailable:
            self._unanswered.update(item.delivery.token for item in ours)
            raise
        if row["missing"] is not None:
            raise BrokerError(f"cannot move to {row['missing']!r}: it is not declared")
        gone = set(row["gone"])
        if not row["alive"]:
            if self._membership is membership:
                self.given_up(membership.consumer)
            return strangers + [item.delivery for item in ours if item.delivery.token in gone]
        if self._claims.settled(ours):
            self.look()
        if row["back"]:
            self._broker.waker.tell((), row["back"])
        refused = self._undone(ours, gone) if gone else []
        if self._unanswered:
            self._unanswered.difference_update([item.delivery.token for item in ours])
        return strangers + refused

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._closed = True
        self._broker.heart.consumers.discard(self)
        if self._bell is not None:
            self._bell.ring()
        self._claims.drop()
        try:
            membership = self._membership
            if self._joining is not None:  # `receive` was just beginning
                membership = await self._joining
            if membership is not None:
                consumer = membership.consumer
                await self._pool.run(lambda connection: connection.execute(self._sql.leave, consumer))
        except BrokerError as error:
            log.warning("could not release what was held, it will be taken over: %s", error)
        self._broker.forget(self)

    def given_up(self, life: int) -> None:
        """We were silent for too long and everything we held has gone to others: begin a new life."""
        if self.life != life:
            return
        self._membership = None
        self._floors = Floors()
        self._unanswered.clear()
        self._claims.lose()
        self.look()

    async def _join(self) -> None:
        if self._joining is None:
            self._joining = under_way(self._enter())
        joining = self._joining
        try:
            membership = await asyncio.shield(joining)  # cancelled, it stays under way for the next call
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._joining = None
            raise
        if self._closed:
            return  # `close` has seen to it
        self._joining = None
        self._membership = membership
        self._broker.heart.consumers.add(self)
        self._broker.heart.start()

    async def _enter(self) -> Membership:
        await self._broker.hear()
        names, lease = list(self._names), self.lease

        async def join(connection: Connection) -> Record | None:
            return await connection.fetchrow(self._sql.join, names, lease)

        row = await self._pool.run(join)
        assert row is not None
        if row["missing"] is not None and await self._broker.declare_again(row["missing"]):  # somebody dropped it
            row = await self._pool.run(join)
            assert row is not None
        if row["missing"] is not None:
            raise BrokerError(f"cannot consume {row['missing']!r}: it is not declared")
        ids = row["ids"]
        ordered = frozenset(id for id, in_order in zip(ids, row["in_order"], strict=True) if in_order)
        return Membership(row["consumer"], dict(zip(ids, names, strict=True)), ordered)

    async def _take(self, room: int) -> Claimed:
        """Messages now in hand, or none and the seconds until a delay ends."""
        membership = self._membership
        if membership is None:
            return Claimed([], None)
        claimed = await self._claims.take(room, lambda: under_way(self._claim(membership, room)))
        if claimed is None:
            self.given_up(membership.consumer)
            return Claimed([], None)
        return claimed

    async def _claim(self, membership: Membership, limit: int) -> Claimed | None:
        """None when the consumer has been given up for dead."""
        queues = list(membership.names)
        self._turn = (self._turn + 1) % len(queues)
        queues = queues[self._turn :] + queues[: self._turn]
        floors = self._floors.of(queues)

        if membership.unsure and not await self._reclaim(membership):
            return None
        asked = (membership.consumer, membership.ticket, queues, floors, limit, MOST_BYTES)

        async def claim(connection: Connection) -> list[Record]:
            return await connection.fetch(self._sql.claim, *asked)

        try:
            rows = await self._pool.run(claim)
        except NotBegun:
            raise
        except BrokerError:
            membership.unsure = True
            raise
        if rows[0]["seq"] is None:
            return None
        if rows[0]["seq"] == 0:
            milliseconds = rows[0]["place"]
            return Claimed([], None if milliseconds is None else milliseconds / 1000)
        order = {queue: nth for nth, queue in enumerate(queues)}
        rows.sort(key=lambda row: (order[row["queue"]], row["place"]))
        if len(rows) == limit:
            last = {row["queue"]: row["place"] for row in rows}
            for queue, place in last.items():
                if queue not in membership.ordered:
                    self._floors.passed(queue, place)
        return Claimed(deliveries(rows, membership.names), None)

    async def _reclaim(self, membership: Membership) -> bool:
        """What was claimed for us without our hearing of it is free again, and no earlier claim is carried out any
        more. Whether we still live."""
        membership.ticket += 1  # for each try: an earlier one, if it is carried out late, does nothing
        ticket = membership.ticket

        async def reclaim(connection: Connection) -> bool:
            return bool(await connection.fetchval(self._sql.reclaim, membership.consumer, list(self._held), ticket))

        alive = await self._pool.run(reclaim)
        membership.unsure = False
        return alive

    def _undone(self, items: Sequence[Settlement], gone: set[int]) -> list[Delivery]:
        """We live, and yet did not hold these: either we settled them before and did not hear of it, or a crash of the
        server undid the claim, and they are others' now."""
        lost = [i.delivery for i in items if i.delivery.token in gone and i.delivery.token not in self._unanswered]
        for delivery in lost:
            delivery.lost = True
        if lost:
            self._on_lost(lost)
        return lost


class _Settling:
    """One call of `settle`."""

    def __init__(self, membership: Membership, items: Sequence[Settlement], statement: str) -> None:
        acks = [item.delivery.token for item in items if type(item) is Ack]
        released = [item for item in items if isinstance(item, Release)]
        moves = [item for item in items if isinstance(item, Move)]
        self._arguments = (
            membership.consumer,
            bool(membership.ordered),
            acks,
            [item.delivery.token for item in released],
            [item.delay for item in released],
            [move.delivery.token for move in moves],
            [move.to for move in moves],
            *columns([move.message for move in moves]),
        )
        self._statement = statement

    async def __call__(self, connection: Connection) -> Record:
        row = await connection.fetchrow(self._statement, *self._arguments)
        assert row is not None
        return row
