"""Values: what was put is what one gets, byte for byte, by every connection, in the order asked for."""

from __future__ import annotations

import asyncio
import time

import pytest

from penstock.stores.base import Delete, Put, Store, Touch
from penstock.testing.stores.harness import Place, StorePromises

KEYS = [
    "",
    "k",
    "a/b",
    " ",
    "with space",
    "%_*?[a]",
    "'\"\\",
    "é",
    "日本",
    "\U0001f600",
    "\x01",
    "\uffff",
    "K",
    "x" * 900,
]


class ValuePromises(StorePromises):
    @pytest.mark.parametrize("value", [b"", b"v", b"\x00", b"a\x00b", bytes(range(256)), b"\xff\xfe", "é".encode()])
    async def test_a_value_comes_back_byte_for_byte(self, place: Place, store: Store, value: bytes) -> None:
        version = await place.put(store, "k", value)
        for connection in (store, await place.connect()):
            entry = await place.get(connection, "k")
            assert entry is not None
            assert (entry.key, entry.value, entry.version, entry.expires_at) == ("k", value, version, None)
            assert type(entry.value) is bytes

    async def test_values_asked_for_together_are_not_mixed_up(self, place: Place, store: Store) -> None:
        values = {f"k{number}": bytes([number % 256]) * (number % 7) for number in range(300)}
        await store.apply([Put(key, value) for key, value in values.items()])
        keys = [*reversed(values), "missing"]
        entries = await store.get(keys)
        assert [entry and (entry.key, entry.value) for entry in entries] == [
            (key, values[key]) if key in values else None for key in keys
        ]

    async def test_every_key_is_one_of_its_own(self, place: Place, store: Store) -> None:
        await place.fill(store, KEYS)
        assert [entry and (entry.key, entry.value) for entry in await store.get(KEYS)] == [
            (key, key.encode()) for key in KEYS
        ]
        for key in KEYS:
            assert await place.value(store, key) == key.encode()

    async def test_entries_come_in_the_order_asked_for_missing_and_twice_ones_too(
        self, place: Place, store: Store
    ) -> None:
        await place.fill(store, ["a", "b"])
        entries = await store.get(["b", "x", "a", "b", "y"])
        assert [entry and entry.key for entry in entries] == ["b", None, "a", "b", None]
        assert await store.get(["x"]) == [None]
        assert await store.get([]) == []

    async def test_a_put_replaces_the_whole_value(self, place: Place, store: Store) -> None:
        await place.put(store, "k", b"long" * 1000)
        await place.put(store, "k", b"short")
        assert await place.value(store, "k") == b"short"

    async def test_a_deleted_entry_is_gone_for_everybody(self, place: Place, store: Store) -> None:
        other = await place.connect()
        await place.put(store, "k")
        assert await place.one(other, Delete("k")) == 0
        for connection in (store, other):
            assert await place.get(connection, "k") is None
            assert await connection.scan("") == []

    async def test_deleting_what_is_not_there_counts_as_done(self, place: Place, store: Store) -> None:
        assert await place.one(store, Delete("k")) == 0
        assert await place.one(store, Delete("k", tell=True)) == 0
        assert await place.get(store, "k") is None

    async def test_what_one_has_confirmed_all_others_see_at_once(self, place: Place, store: Store) -> None:
        others = [await place.connect() for _ in range(3)]
        for number in range(20):
            await place.put(store, "k", str(number).encode())
            for other in others:
                assert await place.value(other, "k") == str(number).encode()

    async def test_event_loops_in_other_threads_see_the_same(self, place: Place, store: Store) -> None:
        thread, theirs = await place.elsewhere()
        await thread.run(place.put(theirs, "k", b"theirs"))
        assert await place.value(store, "k") == b"theirs"
        await place.put(store, "k", b"ours")
        assert await thread.run(place.value(theirs, "k")) == b"ours"

    @pytest.mark.parametrize("key", ["null\0character", "\0", "lone \ud800 surrogate"])
    async def test_a_key_that_not_every_store_can_keep_is_refused(self, place: Place, store: Store, key: str) -> None:
        for change in (Put(key, b""), Delete(key), Touch(key, 1.0)):
            with pytest.raises(ValueError, match=r"."):
                await store.apply([Put("k", b""), change])
        with pytest.raises(ValueError, match=r"."):
            await store.get([key])
        assert await place.get(store, "k") is None

    async def test_reading_goes_on_beside_writing(self, place: Place, store: Store) -> None:
        """Each reader sees one of the values that were put, whole, and never an older one after a newer one."""
        other = await place.connect()
        await place.put(store, "k", b"0" * 1000)
        writing = True

        async def write() -> None:
            nonlocal writing
            for number in range(1, 50):
                await place.put(store, "k", str(number % 10).encode() * 1000)
            writing = False

        async def read() -> int:
            looks, seen, until = 0, 0, time.monotonic() + place.harness.patience
            while writing and time.monotonic() < until:
                entry = await place.get(other, "k")
                assert entry is not None
                assert len(set(entry.value)) == 1
                assert len(entry.value) == 1000
                assert entry.version >= seen
                seen = entry.version
                looks += 1
                await asyncio.sleep(0)
            return looks

        looks = await asyncio.gather(write(), read(), read())
        assert not writing
        assert looks[1] is not None
