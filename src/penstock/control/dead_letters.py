"""Dead letters: looking, replaying, discarding; the same on every message system.

Looking browses where the system can. Replaying and discarding are what any consumer could do: receive
the letters from `Q.dead` and settle them, by a move back to their queue or an acknowledgement.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

import msgspec

from penstock.brokers.base import Ack, Broker, Move, Queue, QueueInfo, Settlement, Subscription
from penstock.client.client import MAX_BODY
from penstock.delivery import dead_letters
from penstock.delivery.dead_letters import DeadLetter, Reason, dead_queue
from penstock.errors import BrokerUnavailable, PublishError, UnknownQueue, near
from penstock.message import Delivery

T = TypeVar("T")

BATCH = 1000  # letters settled together
PAGE = 100  # letters looked at together; their bodies come with them
LEASE = 30.0  # seconds
UNBOUNDED = 2**31 - 1  # prefetch: what does not match is held, without its body, until the end
LOOK = 1.0  # seconds to wait for letters where the system cannot say how many there are
IN_ORDER = 1000  # letters whose order outlasts a look at them, where the system cannot browse
PATIENCE = 30.0  # seconds for which a broker that went away is tried again


class Letters(msgspec.Struct, frozen=True):
    """Some dead letters of a queue, oldest first, and how many there are in all (None: unknown)."""

    letters: list[DeadLetter]
    total: int | None


MOST_SHOWN = 64 * 2**20
"""Bytes of bodies that are shown together."""


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters; by default all."""

    ids: frozenset[str] = frozenset()
    """Only these; empty: any."""
    reason: Reason | None = None
    limit: int | None = None
    """At most so many."""
    before: float | None = None
    """Only those that had died by then; Unix seconds."""

    def takes(self, delivery: Delivery) -> bool:
        if self.ids and delivery.id not in self.ids:
            return False
        if self.reason is None and self.before is None:
            return True
        death = dead_letters.death_of(delivery)
        return self.reason in (None, death.reason) and (self.before is None or death.time <= self.before)


class Outcome(msgspec.Struct):
    """What has been done so far; still true after an interruption."""

    done: int = 0
    missing: frozenset[str] = frozenset()
    """Ids asked for that were not there."""
    stayed: int = 0
    """Letters that should have gone and could not."""
    why: str | None = None
    """Why the first of them could not."""


async def look(broker: Broker, queue: str, limit: int, *, newest: bool = False) -> Letters:
    """The oldest (or newest) dead letters of a queue; fewer than `limit` where they are large, at least one.

    :raises UnknownQueue: no such queue.
    """
    total = await count(broker, queue)
    found: deque[Delivery] = deque()
    size = 0
    async with aclosing(_browse(broker, queue, PAGE if newest else min(limit, PAGE))) as deliveries:
        async for delivery in deliveries:
            if found and not newest and (len(found) >= limit or size + len(delivery.raw) > MOST_SHOWN):
                break
            found.append(delivery)
            size += len(delivery.raw)
            while len(found) > limit or (len(found) > 1 and size > MOST_SHOWN):
                size -= len(found.popleft().raw)
    return Letters([dead_letters.read(delivery, MAX_BODY) for delivery in found], total)


async def count(broker: Broker, queue: str) -> int | None:
    """How many dead letters a queue has; None where the system cannot say.

    :raises UnknownQueue: no such queue.
    """
    info = await _find(broker, queue)
    return None if info is None or info.ready is None else info.ready + (info.unsettled or 0)


async def find(broker: Broker, queue: str, id: str) -> DeadLetter:
    """One dead letter.

    :raises UnknownQueue: no such queue, or no such letter in it.
    """
    await _find(broker, queue)
    async with aclosing(_browse(broker, queue, PAGE)) as deliveries:
        async for delivery in deliveries:
            if delivery.id == id:
                return dead_letters.read(delivery, MAX_BODY)
    raise UnknownQueue(f"{queue!r} has no dead letter {id!r}")


async def replay(broker: Broker, queue: str, selection: Selection, outcome: Outcome, to: Broker | None = None) -> None:
    """Put dead letters back into the queue they came from, their attempts forgotten.

    With `to`, a letter is published there to the name of its queue and acknowledged here once that is
    confirmed: delivered twice at worst, never lost. Where a queue other than its own would get a copy,
    nothing is published.

    :raises UnknownQueue: no such queue.
    :raises BrokerUnavailable: the broker is away for long.
    """
    homes = _Homes(to or broker)

    async def settle(deliveries: list[Delivery]) -> list[Settlement]:
        moves: list[Settlement] = []
        abroad = []
        for delivery in deliveries:
            home, message = dead_letters.revive(delivery)
            complaint = await homes.complaint(home, abroad=to is not None)
            if complaint is not None:
                outcome.stayed += 1
                outcome.why = outcome.why or complaint
            elif to is None:
                moves.append(Move(delivery, home, message))
            else:
                message.topic = home
                abroad.append((delivery, message))
        if to is not None and abroad:
            messages = [message for _, message in abroad]
            refusals: Sequence[PublishError | None] = await _insist(lambda: to.publish(messages))
            for (delivery, _), refusal in zip(abroad, refusals, strict=True):
                if refusal is None:
                    moves.append(Ack(delivery))
                else:
                    outcome.stayed += 1
                    outcome.why = outcome.why or str(refusal)
        return moves

    await _Sweep(broker, queue, selection, outcome).run(settle, once=True)


async def discard(broker: Broker, queue: str, selection: Selection, outcome: Outcome) -> None:
    """Remove dead letters for good.

    :raises UnknownQueue: no such queue.
    :raises BrokerUnavailable: the broker is away for long.
    """

    async def settle(deliveries: list[Delivery]) -> list[Settlement]:
        return [Ack(delivery) for delivery in deliveries]

    await _Sweep(broker, queue, selection, outcome).run(settle, once=False)


class _Homes:
    """The queues that letters may go back to, looked up once each."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._known: dict[str, QueueInfo | None] | None = None

    async def complaint(self, home: str, *, abroad: bool) -> str | None:
        """Why a letter cannot go back to its queue."""
        admin = self._broker.admin
        if admin is None:
            return None
        if self._known is None:
            self._known = {info.name: info for info in await admin.inspect()}
        known = self._known
        if home not in known and not self._broker.capabilities.lists:
            known[home] = next(iter(await admin.inspect([home])), None)
        if known.get(home) is None:
            if abroad:
                return f"the other broker has no queue {home!r}{near(home, known)}"
            return f"there is no queue {home!r} on this broker: start its consumer once, or name its broker with --to"
        others = [info.name for info in known.values() if info and home in (info.bindings or ()) and info.name != home]
        if abroad and others:
            return f"publishing to {home!r} would also reach {', '.join(map(repr, others))}"
        return None


class _Sweep:
    """One pass over the dead letters of a queue."""

    def __init__(self, broker: Broker, queue: str, selection: Selection, outcome: Outcome) -> None:
        self._broker = broker
        self._queue = queue
        self._selection = selection
        self._outcome = outcome
        self._left = UNBOUNDED if selection.limit is None else selection.limit
        self._seen: set[str] = set()

    async def run(self, settle: Callable[[list[Delivery]], Awaitable[list[Settlement]]], *, once: bool) -> None:
        """Settle what the selection takes. The rest is held, and released with the subscription.

        `once`: no id a second time, since what is replayed may be back among the dead at any moment.
        """
        selection, outcome = self._selection, self._outcome
        info = await _find(self._broker, self._queue)
        expected = None if info is None else info.ready
        received = 0
        outcome.missing = selection.ids
        async with _Subscribed(self._broker, self._queue) as subscription:
            while self._left > 0 and (outcome.missing or not selection.ids):
                wait = LOOK if expected is None or received < expected else 0.0
                deliveries = await _insist(lambda: subscription.receive(BATCH, wait))  # noqa: B023 - awaited at once
                if not deliveries:
                    return
                received += len(deliveries)
                taken = self._choose(deliveries, once=once)
                settlements = await settle(taken)
                lost = await _insist(lambda: subscription.settle(settlements))  # noqa: B023
                outcome.done += len(settlements) - len(lost)
                outcome.missing -= {delivery.id for delivery in taken}
                if self._broker.capabilities.releases_in_place:
                    for delivery in deliveries:
                        delivery.raw = b""  # what stays is held: that need not cost its body's memory

    def _choose(self, deliveries: list[Delivery], *, once: bool) -> list[Delivery]:
        taken = []
        for delivery in deliveries:
            if self._left and self._selection.takes(delivery) and not (once and delivery.id in self._seen):
                taken.append(delivery)
                self._left -= 1
                if once:
                    self._seen.add(delivery.id)
        return taken


class _Subscribed:
    """A subscription to the dead letters of a queue, closed at the end, which releases what is held."""

    def __init__(self, broker: Broker, queue: str, *, ahead: bool = True) -> None:
        self._subscription: Subscription = broker.subscribe(
            [Queue(dead_queue(queue))], prefetch=UNBOUNDED, lease=LEASE, on_lost=lambda deliveries: None, ahead=ahead
        )

    async def __aenter__(self) -> Subscription:
        return self._subscription

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(self._subscription.close())


async def _browse(broker: Broker, queue: str, page: int) -> AsyncGenerator[Delivery, None]:
    """Every dead letter in order; received and released again where the system cannot browse."""
    admin = broker.admin
    if admin is None or not broker.capabilities.browse:
        async with _Subscribed(broker, queue, ahead=False) as subscription:
            async for delivery in _borrow(subscription, await count(broker, queue)):
                yield delivery
        return
    position = None
    while True:
        deliveries, position = await admin.browse(dead_queue(queue), page, position)
        for delivery in deliveries:
            yield delivery
        if position is None:
            return


async def _borrow(subscription: Subscription, expected: int | None) -> AsyncGenerator[Delivery, None]:
    """Each letter, to be given back by closing. What is given back goes behind the others, so that as many as
    `IN_ORDER` are taken before the first is shown: all of them given back are in their order again."""
    letters: list[Delivery] = []
    received = 0
    while True:
        wait = LOOK if expected is None or received < expected else 0.0
        deliveries = await subscription.receive(IN_ORDER, wait)
        received += len(deliveries)
        letters += deliveries
        if deliveries and received < IN_ORDER:
            continue
        for delivery in letters:
            yield delivery
        letters.clear()
        if not deliveries:
            return


async def _find(broker: Broker, queue: str) -> QueueInfo | None:
    """The queue of a queue's dead letters; None where the system does not show its queues.

    :raises UnknownQueue: there is none.
    """
    admin = broker.admin
    if admin is None:
        return None
    known = {info.name: info for info in await admin.inspect([queue, dead_queue(queue)])}
    if dead_queue(queue) in known:
        return known[dead_queue(queue)]
    if queue in known:
        raise UnknownQueue(f"no dead letters of {queue!r} are kept on this broker")
    suffix = dead_letters.SUFFIX
    listed = [info.name for info in await admin.inspect()]
    names = [name.removesuffix(suffix) for name in listed if name.endswith(suffix)]
    raise UnknownQueue(f"there is no queue {queue!r}{near(queue, names)}")


async def _insist(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try again while the broker is away, for so long.

    :raises BrokerUnavailable: it did not come back.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + PATIENCE
    while True:
        try:
            return await attempt()
        except BrokerUnavailable:
            if loop.time() >= until:
                raise
        await asyncio.sleep(LOOK)
