"""`Followers`: one watch of a store on behalf of all who wait in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Iterable, Sequence

from penstock.clock import backoff_delay
from penstock.errors import BrokerError, BrokerUnavailable, one_line
from penstock.stores.base import Store, Watch
from penstock.waiting import Bell, Gathering

log = logging.getLogger("penstock.stores")

RECEIVE_WAIT = 30.0  # seconds; only a bound
AT_ONCE = 1000  # entries looked at together
BACKOFF = (0.1, 5.0)  # seconds, first and longest


class Following:
    """Some keys that are followed for a while."""

    __slots__ = ("_bell", "_followers", "_keys")

    def __init__(self, followers: Followers, keys: Sequence[str]) -> None:
        self._followers = followers
        self._keys = keys
        self._bell = Bell()

    async def __aenter__(self) -> Bell:
        try:
            await self._followers._enter(self._keys, self._bell)
        except BaseException:
            self._followers._leave(self._keys, self._bell)
            raise
        return self._bell

    async def __aexit__(self, *raised: object) -> None:
        self._followers._leave(self._keys, self._bell)


class Followers:
    """Rings those who follow a key when it may have changed.

    A store may name keys that have not: where it names many, their versions are looked at first, so that
    ten thousand who wait do not all look for themselves each time.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watch: Watch | None = None
        self._bells: dict[str, set[Bell]] = {}
        self._seen: dict[str, int] = {}
        self._pumping: asyncio.Task[None] | None = None
        self._closed = False
        self._joining: Gathering[Sequence[str], None] = Gathering(self._join)

    def follow(self, keys: Sequence[str]) -> Following:
        """`async with` it: a bell that rings for each change to one of `keys` that is told from now on, and
        when changes may have gone unheard.

        :raises BrokerUnavailable: call again later.
        """
        return Following(self, keys)

    async def _join(self, groups: Sequence[Sequence[str]]) -> list[None]:
        if self._closed:
            raise BrokerUnavailable("nobody is rung any more")
        watch = self._watch = self._watch or self._store.watch()
        await watch.follow([key for keys in groups for key in keys if key in self._bells])
        if not self._closed and (self._pumping is None or self._pumping.done()):
            self._pumping = asyncio.create_task(self._pump(watch), name="penstock-following")
        return [None] * len(groups)

    async def close(self) -> None:
        """Ring nobody any more. Idempotent."""
        self._closed = True
        pumping, self._pumping = self._pumping, None
        if pumping is not None:
            pumping.cancel()
            await asyncio.gather(pumping, return_exceptions=True)
        watch, self._watch = self._watch, None
        if watch is not None:
            with contextlib.suppress(BrokerError):
                await watch.close()

    async def _enter(self, keys: Sequence[str], bell: Bell) -> None:
        for key in keys:
            self._bells.setdefault(key, set()).add(bell)
        await self._joining.do(keys)

    def _leave(self, keys: Iterable[str], bell: Bell) -> None:
        unheeded = []
        for key in keys:
            bells = self._bells.get(key)
            if bells is None:
                continue
            bells.discard(bell)
            if not bells:
                del self._bells[key]
                self._seen.pop(key, None)
                unheeded.append(key)
        if unheeded and self._watch is not None:
            self._watch.unfollow(unheeded)

    async def _pump(self, watch: Watch) -> None:
        failures = 0
        while True:
            try:
                named = await watch.receive(RECEIVE_WAIT)
                if len(named) > 1:
                    named = await self._changed(list(named))
                failures = 0
            except BrokerError as error:  # refused for good, those who wait will see for themselves
                failures += 1
                delay = backoff_delay(failures, BACKOFF, random.Random())  # noqa: S311 - jitter
                log.warning("cannot follow the store, again in %.1f s: %s", delay, one_line(error))
                await asyncio.sleep(delay)
                named = set(self._bells)
            for key in named:
                for bell in self._bells.get(key, ()):
                    bell.ring()

    async def _changed(self, keys: list[str]) -> set[str]:
        """Those with another version than last time; takes as long again when it had much to look at."""
        started = time.monotonic()
        changed: set[str] = set()
        for start in range(0, len(keys), AT_ONCE):
            part = keys[start : start + AT_ONCE]
            for key, entry in zip(part, await self._store.get(part), strict=True):
                version = 0 if entry is None else entry.version
                if self._seen.get(key) != version:
                    changed.add(key)
                    if key in self._bells:
                        self._seen[key] = version
        if len(keys) > AT_ONCE // 10:
            await asyncio.sleep(time.monotonic() - started)
        return changed
