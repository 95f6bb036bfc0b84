"""What a whole cluster may do of one task: so many runs at once, so many begun in a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from penstock.clock import Clock
from penstock.errors import BrokerError, ConfigError, Unavailable, one_line
from penstock.stores.base import ABSENT, Delete, Put, Store

log = logging.getLogger("penstock.tasks")

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)?\s*([smhd])\s*")
SLOT_LEASE = 15.0
"""Seconds for which a slot stays taken after the process that has it went away."""
LONGEST_LOOK = 0.5  # seconds between looks for a free place
LONGEST_HOLD = 60.0
"""Seconds for which a message is held until its turn; then it goes back into its queue, uncounted."""
KEPT = 3600.0  # seconds after which a rate's memory of an idle task is dropped


class Rate(msgspec.Struct, frozen=True):
    """So many runs begun in so many seconds, evenly spread."""

    count: float
    seconds: float

    @property
    def apart(self) -> float:
        """Seconds from one to the next."""
        return self.seconds / self.count


def parse_rate(given: Any) -> Rate:
    """`10` or `10.5` (a second), `"10/s"`, `"100/m"`, `"1/5s"`, `"1000/h"`, `"5/d"`.

    :raises ConfigError: anything else.
    """
    if isinstance(given, int | float) and not isinstance(given, bool) and given > 0:
        return Rate(float(given), 1.0)
    found = _RATE.fullmatch(given) if isinstance(given, str) else None
    if found is None or not float(found[1]) or not float(found[2] or 1):
        raise ConfigError(f"rate_limit must be runs a second, or text such as '10/s', '100/m', '1/5s', not {given!r}")
    return Rate(float(found[1]), float(found[2] or 1) * _UNITS[found[3]])


class Limits:
    """The limits of one task, kept in the store for all processes.

    Who has to wait keeps its message for a while: nothing else of that task could run anyway.
    """

    def __init__(
        self, task: str, store: Store, at_once: int | None, rate: Rate | None, clock: Clock, rng: random.Random
    ) -> None:
        self._task = task
        self._store = store
        self._at_once = at_once
        self._rate = rate
        self._clock = clock
        self._rng = rng

    @contextlib.asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Wait until a run may begin; inside the block it counts.

        :raises BrokerUnavailable: the store is away.
        :raises Unavailable: its turn is too far away to wait for.
        """
        async with contextlib.AsyncExitStack() as held:
            if self._at_once is not None:
                await held.enter_async_context(self._slot(self._at_once))
            if self._rate is not None:
                await self._turn(self._rate)
            yield

    async def _turn(self, rate: Rate) -> None:
        """Take the next moment at which one may begin, and wait for it."""
        key = f"rate/{self._task}"
        while True:
            now = self._clock.time()
            (entry,) = await self._store.get([key])
            last = None if entry is None else msgspec.json.decode(entry.value, type=float)
            # A moment far ahead was written by a clock that has since been set back.
            mine = now if last is None or last - now > KEPT + rate.apart else max(now, last + rate.apart)
            if mine - now > LONGEST_HOLD:
                raise Unavailable(f"rate_limit: {self._task} may begin again in {mine - now:.0f} s")
            put = Put(key, msgspec.json.encode(mine), KEPT + rate.apart, ABSENT if entry is None else entry.version)
            if (await self._store.apply([put]))[0] is not None:
                await asyncio.sleep(max(mine - now, 0.0))
                return

    @contextlib.asynccontextmanager
    async def _slot(self, count: int) -> AsyncIterator[None]:
        """One of `count` places, kept for as long as this process lives and the block lasts."""
        place = await self._take(count)
        keeping = asyncio.create_task(self._keep(place), name=f"penstock-place {place.key}")
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])  # a renewal under way gives it another version
            with contextlib.suppress(BrokerError):  # it is free again after its lease
                await self._store.apply([Delete(place.key, place.version)])

    async def _take(self, count: int) -> _Place:
        pause, until = 0.01, self._clock.monotonic() + LONGEST_HOLD
        while True:
            first = self._rng.randrange(count)
            for number in range(count):
                key = f"place/{self._task}/{(first + number) % count}"
                (version,) = await self._store.apply([Put(key, b"", SLOT_LEASE, ABSENT)])
                if version is not None:
                    return _Place(key, version)
            if self._clock.monotonic() > until:
                raise Unavailable(f"cluster_limit: all {count} places of {self._task} are taken")
            await asyncio.sleep(pause * self._rng.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_LOOK)

    async def _keep(self, place: _Place) -> None:
        """Renew the place until it is lost."""
        while True:
            await asyncio.sleep(SLOT_LEASE / 3)
            try:
                (renewed,) = await self._store.apply([Put(place.key, b"", SLOT_LEASE, place.version)])
            except BrokerError as error:
                log.warning("%s: a place could not be kept: %s", self._task, one_line(error))
                continue
            if renewed is None:
                log.warning("%s: a place among those that run at once was lost", self._task)
                return
            place.version = renewed


class _Place(msgspec.Struct):
    """A place among those that run at once."""

    key: str
    version: int
