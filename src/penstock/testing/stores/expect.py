"""`expect`: change this entry if it is still the one I read. Of many who try, exactly one does."""

from __future__ import annotations

import asyncio

import pytest

from penstock.stores.base import ABSENT, Delete, Put, Store
from penstock.testing.stores.harness import Place, StorePromises


class ExpectPromises(StorePromises):
    async def test_a_put_over_the_expected_version_succeeds(self, place: Place, store: Store) -> None:
        first = await place.put(store, "k", b"1", expect=ABSENT)
        second = await place.put(store, "k", b"2", expect=first)
        entry = await place.get(store, "k")
        assert entry is not None
        assert (entry.value, entry.version) == (b"2", second)

    async def test_a_put_over_another_version_does_nothing(self, place: Place, store: Store) -> None:
        first = await place.put(store, "k", b"1")
        second = await place.put(store, "k", b"2", ttl=1000.0)
        before = await place.get(store, "k")
        for wrong in (first, second + 1, ABSENT):
            assert await place.one(store, Put("k", b"3", expect=wrong)) is None
        assert await place.get(store, "k") == before

    async def test_a_put_over_an_entry_that_is_not_there_does_nothing(self, place: Place, store: Store) -> None:
        assert await place.one(store, Put("k", b"1", expect=1)) is None
        version = await place.put(store, "k", b"1")
        await place.one(store, Delete("k"))
        assert await place.one(store, Put("k", b"2", expect=version)) is None
        assert await place.get(store, "k") is None

    async def test_absent_is_only_what_is_not_there(self, place: Place, store: Store) -> None:
        await place.put(store, "k", b"1", expect=ABSENT)
        assert await place.one(store, Put("k", b"2", expect=ABSENT)) is None
        await place.one(store, Delete("k"))
        await place.put(store, "k", b"3", expect=ABSENT)
        assert await place.value(store, "k") == b"3"

    async def test_what_has_expired_is_absent(self, place: Place, store: Store) -> None:
        version = await place.put(store, "k", b"1", ttl=place.harness.brief)
        await place.gone(store, "k")
        assert await place.one(store, Put("k", b"2", expect=version)) is None
        assert await place.one(store, Delete("k", expect=version)) is None
        await place.put(store, "k", b"3", expect=ABSENT)
        entry = await place.get(store, "k")
        assert entry is not None
        assert (entry.value, entry.expires_at) == (b"3", None)

    async def test_a_delete_is_made_only_to_the_expected_version(self, place: Place, store: Store) -> None:
        first = await place.put(store, "k", b"1")
        second = await place.put(store, "k", b"2")
        for wrong in (first, ABSENT):
            assert await place.one(store, Delete("k", expect=wrong)) is None
        assert await place.value(store, "k") == b"2"
        assert await place.one(store, Delete("k", expect=second)) == 0
        assert await place.get(store, "k") is None
        assert await place.one(store, Delete("k", expect=second)) is None
        assert await place.one(store, Delete("k", expect=ABSENT)) == 0

    @pytest.mark.parametrize("elsewhere", [False, True], ids=["one loop", "a loop each"])
    async def test_of_many_who_claim_an_absent_entry_one_gets_it(
        self, place: Place, store: Store, elsewhere: bool
    ) -> None:
        claim = [place.connect() for _ in range(4)]
        stores = await asyncio.gather(*claim)
        far = [await place.elsewhere() for _ in range(3)] if elsewhere else []
        for number in range(15):
            key = f"k{number}"
            puts = [place.one(one, Put(key, str(at).encode(), expect=ABSENT)) for at, one in enumerate(stores)]
            puts += [
                thread.run(place.one(one, Put(key, str(at).encode(), expect=ABSENT)))
                for at, (thread, one) in enumerate(far, len(stores))
            ]
            outcomes = await asyncio.gather(*puts)
            [winner] = [at for at, outcome in enumerate(outcomes) if outcome is not None]
            entry = await place.get(store, key)
            assert entry is not None
            assert (entry.value, entry.version) == (str(winner).encode(), outcomes[winner])

    async def test_of_many_who_replace_a_version_one_does(self, place: Place, store: Store) -> None:
        stores = await asyncio.gather(*(place.connect() for _ in range(5)))
        version = await place.put(store, "k")
        for _ in range(15):
            outcomes = await asyncio.gather(*(place.one(one, Put("k", b"", expect=version)) for one in stores))
            [version] = [outcome for outcome in outcomes if outcome is not None]

    async def test_of_those_who_delete_and_those_who_replace_one_does(self, place: Place, store: Store) -> None:
        other = await place.connect()
        for number in range(10):
            version = await place.put(store, f"k{number}", b"old")
            put, delete = await asyncio.gather(
                place.one(store, Put(f"k{number}", b"new", expect=version)),
                place.one(other, Delete(f"k{number}", expect=version)),
            )
            assert (put is None) != (delete is None)
            assert await place.value(store, f"k{number}") == (b"new" if delete is None else None)

    @pytest.mark.parametrize("elsewhere", [False, True], ids=["one loop", "a loop each"])
    async def test_a_counter_that_many_raise_misses_nobody(self, place: Place, store: Store, elsewhere: bool) -> None:
        """Read, change if it is still the same, else again: what everything above a store is made of."""

        async def raise_it(by: Store, times: int) -> None:
            for _ in range(times):
                done = None
                while done is None:
                    entry = await place.get(by, "counter")
                    value, version = (0, ABSENT) if entry is None else (int(entry.value), entry.version)
                    done = await place.one(by, Put("counter", str(value + 1).encode(), expect=version))

        here = [raise_it(await place.connect(), 10) for _ in range(3)]
        far = [await place.elsewhere() for _ in range(3)] if elsewhere else []
        await asyncio.gather(*here, *(thread.run(raise_it(one, 10)) for thread, one in far))
        assert await place.value(store, "counter") == (b"60" if elsewhere else b"30")
