"""A memory store over a bad line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from penstock.errors import BrokerUnavailable
from penstock.stores.base import Change, Entry, StoreCapabilities
from penstock.testing.simulation.tasks.steady import InOrder
from penstock.waiting import Bell

if TYPE_CHECKING:
    from penstock.testing.simulation.process import Life
    from penstock.testing.simulation.tasks.world import TaskWorld


class FaultyStore:
    """A memory store over a bad line, as one life of a process sees it.

    A request may not arrive, be carried out and not answered, or be carried out in part. A watch may miss
    something and say so, and may name what has not changed.
    """

    capabilities = StoreCapabilities(durable=False, shared=True)

    def __init__(self, world: TaskWorld, life: Life | None) -> None:
        self._world = world
        self._life = life

    async def open(self) -> None:
        pass  # there is nothing to connect to

    async def close(self) -> None:
        for watch in [one for one in self._world.watches if one.life is self._life]:
            await watch.close()

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        await self._line()
        entries = self._world.store.get(keys)
        await self._line()
        return entries

    async def apply(self, changes: Sequence[Change]) -> list[int | None]:
        world = self._world
        try:
            await self._line()
            some = world.rng.randrange(len(changes)) if world.happens("store half done") else len(changes)
            outcomes = [world.change(self._life, change) for change in changes[:some]]
            if some < len(changes):
                raise BrokerUnavailable("the store went away over it")
            await self._line()
        except BrokerUnavailable:
            world.unheard(self._life, changes)
            raise
        return outcomes

    async def scan(
        self, prefix: str, *, after: str | None = None, limit: int = 100, newest_first: bool = False
    ) -> list[Entry]:
        await self._line()
        entries = self._world.store.scan(prefix, after, limit, newest_first)
        await self._line()
        return entries

    def watch(self) -> FaultyWatch:
        watch = FaultyWatch(self._world, self._life)
        self._world.watches.append(watch)
        return watch

    async def _line(self) -> None:
        await store_line(self._world)


class FaultyWatch:
    """A follower of keys over a bad line."""

    def __init__(self, world: TaskWorld, life: Life | None) -> None:
        self.life = life
        self._world = world
        self._keys: dict[str, None] = {}
        self._told: dict[str, None] = {}
        self._missed = False
        self._bell = Bell()
        self._closed = False

    def tell(self, key: str) -> None:
        """A key has changed: perhaps it arrives."""
        if key not in self._keys:
            return
        if self._world.happens("watch broken"):
            self._missed = True
        else:
            self._told[key] = None
        self._bell.ring()

    async def follow(self, keys: Iterable[str]) -> None:
        await store_line(self._world)
        self._keys.update(dict.fromkeys(keys))

    def unfollow(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._keys.pop(key, None)
            self._told.pop(key, None)

    async def receive(self, wait: float) -> set[str]:
        until = self._world.loop.now + wait
        while not self._closed:
            if self._missed:
                self._missed = False
                raise BrokerUnavailable("the store was away: something may have changed")
            if self._told:
                if self._keys and self._world.happens("watch confused"):
                    self._told[self._world.rng.choice(list(self._keys))] = None
                told, self._told = self._told, {}
                return InOrder(told)
            left = until - self._world.loop.now
            if left <= 0:
                break
            await self._bell.wait(left)
        return set()

    async def close(self) -> None:
        self._closed = True
        if self in self._world.watches:
            self._world.watches.remove(self)
        self._bell.ring()


async def store_line(world: TaskWorld) -> None:
    """What a request goes through, before it is carried out and after: time, and perhaps a break."""
    await asyncio.sleep(world.rng.choice([0.0, 0.0, 0.001, 0.05]))
    if world.store_is_away() or world.happens("store error"):
        raise BrokerUnavailable("the store is away")
