"""Time to live: an entry is there until then, and from then on is not there at all."""

from __future__ import annotations

import asyncio
import time

from penstock.stores.base import ABSENT, Delete, Put, Store, Touch
from penstock.testing.stores.harness import Place, StorePromises


class TtlPromises(StorePromises):
    async def test_an_entry_lives_for_its_time_and_no_longer(self, place: Place, store: Store) -> None:
        ttl = place.harness.brief
        began = time.monotonic()
        await place.put(store, "k", b"v", ttl=ttl)
        value = await place.value(store, "k")
        if time.monotonic() - began < ttl - place.harness.slack:  # else the machine was busy
            assert value == b"v"
        await place.gone(store, "k")
        assert time.monotonic() - began >= ttl - place.harness.slack

    async def test_when_it_expires_can_be_read(self, place: Place, store: Store) -> None:
        before = time.time()
        await store.apply([Put("a", b"", ttl=1000.0), Put("b", b"", ttl=0.5e9), Put("c", b"")])
        after = time.time()
        a, b, c = await store.get(["a", "b", "c"])
        assert a is not None
        assert b is not None
        assert c is not None
        assert a.expires_at is not None
        assert b.expires_at is not None
        assert before - place.harness.slack <= a.expires_at - 1000.0 <= after + place.harness.slack
        assert before - place.harness.slack <= b.expires_at - 0.5e9 <= after + place.harness.slack
        assert c.expires_at is None
        assert [entry.expires_at for entry in await store.scan("")] == [a.expires_at, b.expires_at, None]

    async def test_what_has_expired_is_nowhere_to_be_seen(self, place: Place, store: Store) -> None:
        await place.fill(store, ["a", "b", "c"])
        await place.put(store, "b", ttl=place.harness.brief)
        await place.gone(store, "b")
        for connection in (store, await place.connect()):
            assert [entry and entry.key for entry in await connection.get(["a", "b", "c"])] == ["a", None, "c"]
            for newest_first in (False, True):
                found = await connection.scan("", newest_first=newest_first)
                assert {entry.key for entry in found} == {"a", "c"}
            assert [entry.key for entry in await connection.scan("", limit=2)] == ["a", "c"]
        assert await place.one(store, Touch("b", 1000.0)) is None
        assert await place.one(store, Delete("b")) == 0

    async def test_no_time_at_all_is_over_at_once(self, place: Place, store: Store) -> None:
        for ttl in (0.0, -1.0):
            await place.put(store, "k", b"old")
            version = await place.put(store, "k", b"new", ttl=ttl)
            assert await place.get(store, "k") is None
            assert await place.one(store, Put("k", b"", expect=version)) is None
            assert await store.scan("") == []

    async def test_a_put_begins_the_time_anew(self, place: Place, store: Store) -> None:
        brief = place.harness.brief
        await store.apply([Put("a", b"", ttl=brief), Put("b", b"", ttl=brief), Put("short", b"", ttl=brief)])
        await store.apply([Put("a", b"new"), Put("b", b"new", ttl=1000.0)])
        await place.gone(store, "short")
        assert await place.value(store, "a") == b"new"
        assert await place.value(store, "b") == b"new"

    async def test_a_touch_prolongs_shortens_and_ends_it(self, place: Place, store: Store) -> None:
        brief = place.harness.brief
        await store.apply([Put("long", b"", ttl=brief), Put("ever", b"", ttl=brief), Put("short", b"s", ttl=1000.0)])
        await store.apply([Touch("long", 1000.0), Touch("ever", None), Touch("short", brief)])
        await place.gone(store, "short")
        long, ever = await store.get(["long", "ever"])
        assert long is not None
        assert long.expires_at is not None
        assert ever is not None
        assert ever.expires_at is None
        await place.one(store, Touch("ever", -1.0))
        assert await place.get(store, "ever") is None

    async def test_touched_again_and_again_it_lives_on(self, place: Place, store: Store) -> None:
        ttl = 4 * place.harness.brief
        version = await place.put(store, "k", ttl=ttl)
        until = time.monotonic() + 1.5 * ttl
        while time.monotonic() < until:
            assert await place.one(store, Touch("k", ttl)) == version
            await asyncio.sleep(ttl / 20)
        await place.gone(store, "k")

    async def test_touching_what_is_not_there_does_nothing(self, place: Place, store: Store) -> None:
        assert await place.one(store, Touch("k", 1000.0)) is None
        assert await place.one(store, Touch("k", None)) is None
        assert await place.get(store, "k") is None
        await place.put(store, "k", expect=ABSENT)

    async def test_times_are_each_entrys_own(self, place: Place, store: Store) -> None:
        brief = place.harness.brief
        await store.apply([Put(f"k{number}", b"", ttl=brief if number % 2 else 1000.0) for number in range(200)])
        await place.gone(store, "k199")
        assert len(await store.scan("", limit=1000)) == 100

    async def test_a_time_longer_than_anybody_lives_is_no_error(self, place: Place, store: Store) -> None:
        await place.put(store, "k", b"v", ttl=1e9)
        assert await place.one(store, Touch("k", 3e9)) is not None
        assert await place.value(store, "k") == b"v"
