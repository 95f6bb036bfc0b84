"""The loop that enqueues what is due: once each in the cluster, whichever process comes first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar

import msgspec

from penstock.clock import SYSTEM_CLOCK, Clock, backoff_delay
from penstock.errors import BrokerError, ConfigError, PublishTimeout, one_line
from penstock.stores.base import ABSENT, Entry, Put, Store
from penstock.tasks.instants import SHORTEST, Schedule, instant_id

log = logging.getLogger("penstock.schedule")

T = TypeVar("T")
Enqueue: TypeAlias = Callable[[str, Sequence[tuple[str, float]]], Awaitable[None]]
"""`enqueue(name, [(id, instant), …])` publishes a task for each, or raises BrokerError."""

# All in seconds.
CATCH_UP = 60.0
"""Instants up to this late are each enqueued; of older ones only the newest."""
CLAIM = 10.0
"""A claim in which nothing has stirred for so long belongs to a process that is gone."""
PATIENCE = 45.0
"""What `enqueue` may take: not so long that what is due meanwhile comes too late."""
GRACE = 5.0
"""What a round may still take when the process stops."""
LOOK = 1.0
"""Between two looks at another's claim."""
YIELD = 5.0
"""What is due may wait so long for the others, in a process that could not enqueue the last time."""
REST = 30.0
"""The longest sleep: the clock may be set meanwhile."""
ANSWER = 75.0
"""A definition whose processes have let a rival go unanswered for so long has none left."""
AHEAD = 86_400.0
"""A last instant further in the future is the work of a clock that was wrong."""
JITTER = 0.02
BACKOFF = (0.1, 5.0)
SHORTEST_PAUSE = 0.05

MOST = 1000
"""Instants a claim."""
_IN_TIME = int(CATCH_UP / SHORTEST) + 2


class State(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the store remembers of a schedule, at `schedule/<name>`, as JSON."""

    definition: str
    """The instants are those of this definition."""
    last: float
    """Every instant up to here is enqueued, or skipped, or came before the schedule."""
    claimed: tuple[float, ...] = ()
    """The instants beyond that somebody is enqueuing now."""
    by: str = ""
    """Who: host, process id and a random part; empty: nobody any more, it could not."""
    rival: str = ""
    """Another definition, whose processes ask whether this one has any left."""


replace = msgspec.structs.replace


def key(name: str) -> str:
    """Where a schedule's `State` is."""
    return f"schedule/{name}"


class Scheduler:
    """Enqueues the instants of some schedules, once each in the cluster, whatever process is the first.

    Each process runs one. Whoever finds instants due *claims* them in the store by compare-and-set,
    enqueues them, and says that it has. A claim is renewed while `enqueue` runs; when nothing has stirred
    in it for 10 s, measured by whoever watches, so that no clock needs to be right, another process takes
    it over and enqueues the same ids again. That, and an `enqueue` that failed without telling how far it
    came, are the only ways in which an id is enqueued twice.

    Missed instants: those up to 60 s late are each enqueued. Of those older than that only the newest one
    is, once, and the number of the others is logged. A new schedule begins now: nothing before counts.

    `last` never goes back, so a clock that is put back enqueues nothing again; one that leaps forward
    looks like a pause. Only a `last` more than a day ahead is not believed, and begins anew.

    Where processes disagree on a definition, that of the one that started last holds: it begins anew when
    that process first looks. The others stand aside, and ask now and then whether anybody holds to it
    still; if nobody answers they take it back, and begin anew.

    :raises ConfigError: two schedules of one name: what is remembered of them is one entry.
    """

    def __init__(
        self,
        schedules: Sequence[Schedule],
        store: Store,
        enqueue: Enqueue,
        clock: Clock = SYSTEM_CLOCK,
        rng: random.Random | None = None,
    ) -> None:
        names = [schedule.name for schedule in schedules]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"task {name!r} has more than one schedule")
        rng = rng or random.Random()  # noqa: S311 - jitter
        who = f"{socket.gethostname()}:{os.getpid()}:{os.urandom(4).hex()}"
        self._runners = [_Runner(schedule, store, enqueue, clock, rng, who) for schedule in schedules]

    async def run(self) -> None:
        """For ever; at once if there are no schedules. Cancelled, it first ends what is under way, within 5 s.

        While store or broker is away it tries again with backoff, and logs each try. What is no
        BrokerError ends it.
        """
        runs = [asyncio.create_task(runner.run()) for runner in self._runners]
        try:
            await asyncio.gather(*runs)
        finally:
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)


class _Runner:
    """One schedule in one process."""

    def __init__(
        self, schedule: Schedule, store: Store, enqueue: Enqueue, clock: Clock, rng: random.Random, who: str
    ) -> None:
        self._schedule, self._name, self._key = schedule, schedule.name, key(schedule.name)
        self._store, self._enqueue, self._clock, self._rng = store, enqueue, clock, rng
        self._who = who
        self._enqueued: tuple[float, ...] = ()  # by us, though the store may not know yet
        self._seen = (ABSENT, 0.0)  # a version, and when it was first seen
        self._version = ABSENT  # of our claim
        self._failing = False  # we could not enqueue the last time
        self._held = False  # our definition has held before
        self._aside = False

    async def run(self) -> None:
        failures = 0
        while True:
            try:
                pause = await _to_its_end(self._round())
                failures = 0
            except BrokerError as error:
                failures += 1
                self._seen = (ABSENT, 0.0)  # whoever has a claim could not renew it either
                pause = max(backoff_delay(failures, BACKOFF, self._rng), SHORTEST_PAUSE)
                log.warning("schedule %r failed, again in %.1f s: %s", self._name, pause, one_line(error))
            await asyncio.sleep(pause)

    async def _round(self) -> float:
        """Look at the store and do what is to be done; seconds until the next look."""
        asked, now = self._clock.monotonic(), self._clock.time()
        (entry,) = await self._store.get([self._key])
        version = ABSENT if entry is None else entry.version
        state = self._read(entry)
        if state is None:
            return await self._begin(version, now)
        if state.claimed:
            return await self._attend(state, version, asked)
        if state.definition != self._schedule.definition:
            return await self._compete(state, version, now)
        self._held, self._aside = True, False
        if state.last > now + AHEAD:
            log.warning("schedule %r: its last instant is more than a day ahead of this clock", self._name)
            return await self._begin(version, now)
        due, skipped = self._due(state.last, now)
        if due:
            if self._failing and now - due[0] < YIELD:
                return LOOK
            claim = await self._claim(state, version, due)
            if claim is None:
                return 0.0
            if skipped:
                some = f"{skipped} or more" if skipped >= MOST else str(skipped)
                log.warning("schedule %r: skipped %s instants missed by over %g s", self._name, some, CATCH_UP)
            return await self._carry_out(*claim, asked)
        if state.rival:
            await self._put(replace(state, rival=""), version)
        return self._until_next(state.last)

    # -- what is due

    def _due(self, last: float, now: float) -> tuple[list[float], int]:
        """The instants to be enqueued now, some thousand at most, and how many before them are skipped."""
        horizon = now - CATCH_UP
        old = self._schedule.instants(last, horizon, MOST + 1) if last < horizon else []
        fresh = self._schedule.instants(max(last, horizon), now, _IN_TIME)
        return [*old[-1:], *fresh][:MOST], max(len(old) - 1, 0)

    def _until_next(self, last: float) -> float:
        wait = self._schedule.next(last) - self._clock.time()
        # Not all processes at the same moment; which of them is first does not matter.
        return min(wait + self._rng.uniform(0.0, JITTER), REST) if wait > 0 else 0.0

    # -- claims

    async def _attend(self, state: State, version: int, asked: float) -> float:
        """Instants are claimed: ours to carry out, somebody's who is at it, or to be taken over."""
        if state.by == self._who:  # we were not told that it succeeded, or failed afterwards
            return await self._carry_out(state, version, asked)
        if self._unchanged(version) < (CLAIM if state.by else YIELD if self._failing else 0.0):
            return LOOK
        claim = await self._claim(state, version, state.claimed)
        if claim is None:
            return 0.0
        if state.by:
            log.warning("schedule %r: %s left %d instants, taken over", self._name, state.by, len(state.claimed))
        return await self._carry_out(*claim, asked)

    async def _claim(self, state: State, version: int, instants: Sequence[float]) -> tuple[State, int] | None:
        """The state with these instants in our hands; None: somebody was faster."""
        claim = replace(state, claimed=tuple(instants), by=self._who)
        claimed = await self._put(claim, version)
        return None if claimed is None else (claim, claimed)

    async def _carry_out(self, claim: State, version: int, asked: float) -> float:
        """Enqueue what we had claimed when the store was asked at `asked`."""
        if self._clock.monotonic() - asked > CLAIM / 2:
            return 0.0  # this process stood still: is it ours still?
        self._version = version
        if claim.claimed != self._enqueued:
            try:
                await self._publish(claim)
            except BrokerError:
                self._failing = True
                await self._release(claim)
                raise
            self._enqueued, self._failing = claim.claimed, False
        newest = claim.claimed[-1]
        if await self._put(replace(claim, last=newest, claimed=(), by=""), self._version) is None:
            return 0.0
        return self._until_next(newest)

    async def _publish(self, claim: State) -> None:
        holding = asyncio.create_task(self._hold(claim))
        try:
            async with asyncio.timeout(PATIENCE):
                await self._enqueue(self._name, [(instant_id(self._name, one), one) for one in claim.claimed])
        except TimeoutError as error:
            if isinstance(error, BrokerError):
                raise
            raise PublishTimeout(f"not enqueued within {PATIENCE:g} s") from None
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)

    async def _hold(self, claim: State) -> None:
        """Renew a claim until it is lost."""
        while True:
            await asyncio.sleep(CLAIM / 4)
            try:
                version = await self._put(claim, self._version)
            except BrokerError as error:
                log.debug("schedule %r: claim not renewed: %s", self._name, one_line(error))
                continue
            if version is None:
                return
            self._version = version

    async def _release(self, claim: State) -> None:
        """Another process may reach the broker where we could not: let it try at once."""
        with contextlib.suppress(BrokerError):
            await self._put(replace(claim, by=""), self._version)

    # -- definitions

    async def _begin(self, version: int, last: float) -> float:
        """From now on our definition holds, and what is beyond `last` counts."""
        if await self._put(State(self._schedule.definition, last), version) is not None:
            log.info("schedule %r begins: %s", self._name, self._schedule.definition)
            self._held = True
        return 0.0

    async def _compete(self, state: State, version: int, now: float) -> float:
        """Another definition holds. At our first look ours is the newer one; later only if that one has died out."""
        unanswered = bool(state.rival) and self._unchanged(version) >= ANSWER
        if unanswered or not self._held:
            return await self._begin(version, now if state.last > now + AHEAD else max(state.last, now))
        if not self._aside:
            self._aside = True
            log.warning(
                "schedule %r is %s in a process that started later; %s stands aside",
                *(self._name, state.definition, self._schedule.definition),
            )
        if not state.rival:
            await self._put(replace(state, rival=self._schedule.definition), version)
        return REST

    # -- the store

    def _read(self, entry: Entry | None) -> State | None:
        if entry is None:
            return None
        try:
            return msgspec.json.decode(entry.value, type=State)
        except (msgspec.DecodeError, UnicodeError) as error:
            log.warning("schedule %r: what was stored cannot be read: %s", self._name, one_line(error))
            return None

    async def _put(self, state: State, expect: int) -> int | None:
        (version,) = await self._store.apply([Put(self._key, msgspec.json.encode(state), expect=expect)])
        return version

    def _unchanged(self, version: int) -> float:
        """Seconds for which this process has seen the entry at this version."""
        now = self._clock.monotonic()
        if self._seen[0] != version:
            self._seen = (version, now)
        return now - self._seen[1]


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Do it; when cancelled, let it end first, for a while: what is half done is done again elsewhere."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        try:
            await asyncio.wait([task], timeout=GRACE)
        finally:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
