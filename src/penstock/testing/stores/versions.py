"""Versions: each put gets one that its key never had, larger than all it had before."""

from __future__ import annotations

import asyncio
import itertools

from penstock.stores.base import ABSENT, Delete, Put, Store, Touch
from penstock.testing.stores.harness import Place, StorePromises


def increase(versions: list[int]) -> bool:
    return all(earlier < later for earlier, later in itertools.pairwise(versions))


class VersionPromises(StorePromises):
    async def test_every_put_has_a_larger_one(self, place: Place, store: Store) -> None:
        versions = [await place.put(store, "k", b"same") for _ in range(10)]
        assert increase(versions)
        assert versions[0] > ABSENT

    async def test_also_where_several_connections_take_turns(self, place: Place, store: Store) -> None:
        stores = [store, await place.connect(), await place.connect()]
        versions = []
        for number in range(20):
            await place.put(stores[(number + 1) % 3], f"other{number}")
            versions.append(await place.put(stores[number % 3], "k"))
        assert increase(versions)

    async def test_also_after_a_deletion(self, place: Place, store: Store) -> None:
        versions = []
        for connection in (store, await place.connect(), store):
            versions.append(await place.put(connection, "k"))
            assert await place.one(connection, Delete("k")) == 0
        assert increase(versions)

    async def test_also_after_an_expiry(self, place: Place, store: Store) -> None:
        versions = []
        for _ in range(3):
            versions.append(await place.put(store, "k", ttl=place.harness.brief / 2))
            await place.gone(store, "k")
        versions.append(await place.put(await place.connect(), "k"))
        assert increase(versions)

    async def test_also_after_everything_was_deleted_and_closed(self, place: Place, store: Store) -> None:
        keeper = None if store.capabilities.durable else await place.connect()
        await place.fill(store, [f"k{number}" for number in range(50)])
        last = await place.put(store, "k")
        entries = await store.scan("", limit=1000)
        await store.apply([Delete(entry.key) for entry in entries])
        await store.close()
        assert await place.put(keeper or await place.connect(), "k") > last

    async def test_also_within_a_batch(self, place: Place, store: Store) -> None:
        outcomes = await store.apply([Put("k", str(number).encode()) for number in range(20)])
        versions = [outcome for outcome in outcomes if outcome is not None]
        assert len(versions) == 20
        assert increase(versions)
        entry = await place.get(store, "k")
        assert entry is not None
        assert (entry.value, entry.version) == (b"19", versions[-1])

    async def test_a_refused_put_gives_none_away_twice(self, place: Place, store: Store) -> None:
        versions = [await place.put(store, "k")]
        for _ in range(5):
            assert await place.one(store, Put("k", b"", expect=versions[-1] + 1000)) is None
            versions.append(await place.put(store, "k"))
        assert increase(versions)

    async def test_a_touch_keeps_the_version_and_the_value(self, place: Place, store: Store) -> None:
        version = await place.put(store, "k", b"v", ttl=1000.0)
        for ttl in (2000.0, None, 500.0):
            assert await place.one(store, Touch("k", ttl)) == version
            entry = await place.get(store, "k")
            assert entry is not None
            assert (entry.value, entry.version) == (b"v", version)

    async def test_puts_at_the_same_time_have_different_ones(self, place: Place, store: Store) -> None:
        stores = await asyncio.gather(*(place.connect() for _ in range(4)))
        thread, far = await place.elsewhere()

        async def several(by: Store) -> list[int]:
            return [await place.put(by, "k", ttl=100.0) for _ in range(15)]

        found = await asyncio.gather(*(several(one) for one in stores), thread.run(several(far)))
        assert all(increase(versions) for versions in found)
        every = [version for versions in found for version in versions]
        assert len(set(every)) == len(every)
        entry = await place.get(store, "k")
        assert entry is not None
        assert entry.version == max(every)
