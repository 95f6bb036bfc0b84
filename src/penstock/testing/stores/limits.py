"""Large values, many keys, much at once."""

from __future__ import annotations

import asyncio
import os

from penstock.stores.base import Delete, Put, Store
from penstock.testing.stores.harness import Place, StorePromises


class LimitPromises(StorePromises):
    async def test_the_largest_value_comes_back_whole(self, place: Place, store: Store) -> None:
        value = os.urandom(1 << 16) * (place.harness.largest_value >> 16)
        version = await place.put(store, "large", value)
        await place.put(store, "small", b"s")
        large, small = await (await place.connect()).get(["large", "small"])
        assert large is not None
        assert small is not None
        assert large.value == value
        assert small.value == b"s"
        [found] = await store.scan("l")
        assert found == large
        await place.put(store, "large", value[::-1], expect=version)
        assert await place.value(store, "large") == value[::-1]
        assert await place.one(store, Delete("large")) == 0

    async def test_several_large_values_in_one_batch(self, place: Place, store: Store) -> None:
        size = place.harness.largest_value // 4
        values = {f"k{number}": bytes([number]) * size for number in range(8)}
        assert None not in await store.apply([Put(key, value) for key, value in values.items()])
        for entries in (await store.get(list(values)), await store.scan("k")):
            assert [entry and entry.value == values[entry.key] for entry in entries] == [True] * 8

    async def test_thousands_of_keys_in_one_get(self, place: Place, store: Store) -> None:
        keys = [f"run/{number:06}/queue" for number in range(5000)]
        for start in range(0, len(keys), 1000):
            await place.fill(store, keys[start : start + 1000 : 2])
        entries = await store.get(keys)
        assert [entry and entry.value for entry in entries] == [
            None if number % 2 else key.encode() for number, key in enumerate(keys)
        ]

    async def test_thousands_of_changes_in_one_batch(self, place: Place, store: Store) -> None:
        keys = [f"run/{number:06}/queue" for number in range(3000)]
        versions = await store.apply([Put(key, b"1") for key in keys])
        assert None not in versions
        assert len(set(versions)) == len(keys)
        again = await store.apply([Put(key, b"2", expect=version) for key, version in zip(keys, versions, strict=True)])
        assert None not in again
        stale = await store.apply([Put(key, b"3", expect=version) for key, version in zip(keys, versions, strict=True)])
        assert stale == [None] * len(keys)
        deletes = [Delete(key, expect=version) for key, version in zip(keys, again, strict=True)]
        assert await store.apply(deletes) == [0] * len(keys)
        assert await store.scan("") == []

    async def test_many_calls_under_way_together_are_all_answered(self, place: Place, store: Store) -> None:
        other = await place.connect()

        async def one(number: int) -> bool:
            by = (store, other)[number % 2]
            version = await place.put(by, f"k{number}", str(number).encode())
            entries = await by.get([f"k{number}", "none"])
            found = await by.scan(f"k{number}", limit=1)
            return entries == [found[0], None] and found[0].version == version

        assert all(await asyncio.gather(*(one(number) for number in range(300))))

    async def test_long_keys_are_keys(self, place: Place, store: Store) -> None:
        keys = ["x" * 500 + str(number) for number in range(3)] + ["日" * 300]
        await place.fill(store, keys)
        assert [entry.key for entry in await store.scan("x" * 500)] == keys[:3]
        assert await place.value(store, keys[3]) == keys[3].encode()
