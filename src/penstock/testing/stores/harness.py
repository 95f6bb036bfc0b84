"""What the suite needs of an adapter (`StoreHarness`), and the hands its tests have (`Place`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from penstock.stores.base import Change, Entry, Put, Store, Watch
from penstock.testing.elsewhere import Elsewhere


@dataclass(frozen=True, kw_only=True)
class StoreHarness:
    """One place to remember things for one test, empty at its beginning."""

    connect: Callable[[], Store]
    """Another store object for that place, not yet opened: each stands for another process."""
    patience: float = 15.0
    """Seconds to wait for what must happen."""
    quiet: float = 0.1
    """Seconds to wait for what must not happen; at least the time a wake-up takes to arrive."""
    prompt: float = 0.5
    """Seconds within which a watch that waits hears of a change, when nothing else goes on."""
    brief: float = 0.25
    """A short time to live, in seconds."""
    slack: float = 0.1
    """Seconds by which the store's clock may be off, and its times rounded."""
    largest_value: int = 8 * 2**20
    """Bytes; the engine's default ceiling, or the store's own."""


class Place:
    """The place under test. What a test opens through it is closed when the test ends."""

    def __init__(self, harness: StoreHarness) -> None:
        self.harness = harness
        self._stores: list[Store] = []
        self._elsewhere: list[tuple[Elsewhere, Store]] = []

    async def connect(self) -> Store:
        """Another connection, opened."""
        store = self.harness.connect()
        self._stores.append(store)
        await store.open()
        return store

    async def elsewhere(self) -> tuple[Elsewhere, Store]:
        """A connection that belongs to another event loop, in another thread."""
        place = Elsewhere()
        store = self.harness.connect()
        self._elsewhere.append((place, store))
        await place.run(store.open())
        return place, store

    async def put(self, store: Store, key: str, value: bytes = b"", **terms: Any) -> int:
        """Put, and succeed; the version."""
        [version] = await store.apply([Put(key, value, **terms)])
        assert version is not None, f"{key!r} was not put"
        assert version > 0
        return version

    async def fill(self, store: Store, keys: Collection[str], **terms: Any) -> None:
        outcomes = await store.apply([Put(key, key.encode(), **terms) for key in keys])
        assert None not in outcomes
        assert len(outcomes) == len(keys)

    async def get(self, store: Store, key: str) -> Entry | None:
        [entry] = await store.get([key])
        return entry

    async def value(self, store: Store, key: str) -> bytes | None:
        entry = await self.get(store, key)
        return None if entry is None else entry.value

    async def one(self, store: Store, change: Change) -> int | None:
        """Make a single change; its outcome."""
        [outcome] = await store.apply([change])
        return outcome

    async def gone(self, store: Store, key: str) -> None:
        """Wait until an entry is gone by itself."""
        until = time.monotonic() + self.harness.patience
        while await self.get(store, key) is not None:
            assert time.monotonic() < until, f"{key!r} did not expire within {self.harness.patience:g} s"
            await asyncio.sleep(0.01)

    async def following(self, store: Store, *keys: str) -> Watch:
        """A new watch that follows some keys."""
        watch = store.watch()
        await watch.follow(keys)
        return watch

    async def hear(self, watch: Watch, *keys: str) -> None:
        """Wait until a watch has named all of these; it may name others."""
        missing = set(keys)
        until = time.monotonic() + self.harness.patience
        while missing:
            left = until - time.monotonic()
            assert left > 0, f"{missing} not heard of within {self.harness.patience:g} s"
            missing -= await watch.receive(left)

    async def blocked(self, watch: Watch) -> asyncio.Task[set[str]]:
        """A `receive` that waits, having heard nothing."""
        receiving = asyncio.create_task(watch.receive(self.harness.patience))
        done, _ = await asyncio.wait({receiving}, timeout=self.harness.quiet)
        assert not done, f"there was something to hear: {receiving.result()}"
        return receiving

    async def woken(self, receiving: asyncio.Task[set[str]]) -> set[str]:
        """What a blocked `receive` returns, long before its own wait is over."""
        async with asyncio.timeout(self.harness.patience / 2):
            return await receiving

    async def close(self) -> None:
        for store in self._stores:
            await store.close()
        for place, store in self._elsewhere:
            await place.run(store.close())
            await place.end()


class StorePromises:
    """The fixtures that the tests of every verb share."""

    pytestmark = pytest.mark.asyncio

    @pytest_asyncio.fixture
    async def place(self, harness: StoreHarness) -> AsyncIterator[Place]:
        place = Place(harness)
        yield place
        await place.close()

    @pytest_asyncio.fixture
    async def store(self, place: Place) -> Store:
        return await place.connect()
