"""Scanning: the keys of a prefix in the order of their code points, page by page, in both directions."""

from __future__ import annotations

import itertools

import pytest

from penstock.stores.base import Delete, Entry, Put, Store
from penstock.testing.stores.harness import Place, StorePromises

# UTF-16 would put the emoji before U+FFFF, a locale "É" beside "e", a pattern would stumble over % and _.
KEYS = [
    *("", " ", "a", "A", "Z", "a/", "a/1", "a/10", "a/2", "a0", "a_", "a%", "aa", "ab", "a\x01", "a\x7f", "b"),
    *("e", "é", "É", "f", "日本", "日本/x", "日", "\ud7ff", "\ue000", "\ue000/x", "\uffff", "\uffff/x"),
    *(
        "\U0001f600",
        "\U0001f600/x",
        "\U0010ffff",
        "\U0010ffff/x",
        "\U0010ffff\U0010ffff",
        "a\U0010ffff",
        "a\U0010ffffb",
    ),
    *("*", "[a]", "?", "'", '"', "\\", "run/1", "run/1/q", "run/10", "run/2/q"),
]
PREFIXES = [
    "",
    "a",
    "a/",
    "a/1",
    "a_",
    "a%",
    "A",
    "é",
    "日",
    "日本",
    "\ud7ff",
    "\ue000",
    "\uffff",
    "\U0001f600",
    "\x7f",
]
PREFIXES += ["\U0010ffff", "a\U0010ffff", "\U0010ffff\U0010ffff", "run/1", "run/1/", "run/", "none", "*", "\\", "\x01"]


def keys_of(entries: list[Entry]) -> list[str]:
    return [entry.key for entry in entries]


class ScanPromises(StorePromises):
    @pytest.mark.parametrize("newest_first", [False, True], ids=["ascending", "descending"])
    async def test_a_prefix_finds_its_keys_in_order_and_no_others(
        self, place: Place, store: Store, newest_first: bool
    ) -> None:
        await place.fill(store, KEYS)
        for prefix in PREFIXES:
            wanted = sorted((key for key in KEYS if key.startswith(prefix)), reverse=newest_first)
            found = await store.scan(prefix, newest_first=newest_first)
            assert keys_of(found) == wanted, f"prefix {prefix!r}"
            assert [entry.value for entry in found] == [key.encode() for key in wanted]

    @pytest.mark.parametrize("newest_first", [False, True], ids=["ascending", "descending"])
    async def test_after_goes_on_beyond_a_key_whether_it_is_there_or_not(
        self, place: Place, store: Store, newest_first: bool
    ) -> None:
        await place.fill(store, KEYS)
        for prefix, after in itertools.product(["", "a", "a/", "run/1", "\uffff"], [*KEYS, "a/15", "none", "\x02"]):
            wanted = sorted(key for key in KEYS if key.startswith(prefix))
            wanted = (
                [key for key in reversed(wanted) if key < after] if newest_first else [k for k in wanted if k > after]
            )
            found = await store.scan(prefix, after=after, newest_first=newest_first)
            assert keys_of(found) == wanted, f"prefix {prefix!r} after {after!r}"

    @pytest.mark.parametrize("newest_first", [False, True], ids=["ascending", "descending"])
    @pytest.mark.parametrize("limit", [1, 7, 64, 100, 101, 1000])
    async def test_pages_put_together_are_the_whole(
        self, place: Place, store: Store, limit: int, newest_first: bool
    ) -> None:
        keys = sorted(f"k/{number:03}" for number in range(250))
        await place.fill(store, [*keys, "j", "l", "k", "k0"])
        found: list[str] = []
        while page := await store.scan(
            "k/", after=found[-1] if found else None, limit=limit, newest_first=newest_first
        ):
            assert len(page) <= limit
            assert len(page) == limit or len(found) + len(page) == len(keys)
            found += keys_of(page)
        assert found == (keys[::-1] if newest_first else keys)

    async def test_a_limit_is_kept_and_has_a_default(self, place: Place, store: Store) -> None:
        keys = sorted(f"k{number:03}" for number in range(150))
        await place.fill(store, keys)
        assert keys_of(await store.scan("k")) == keys[:100]
        assert keys_of(await store.scan("k", newest_first=True)) == keys[:49:-1]
        assert keys_of(await store.scan("k", limit=3)) == keys[:3]
        assert await store.scan("k", limit=0) == []
        assert keys_of(await store.scan("k", limit=10**6)) == keys

    async def test_an_entry_found_is_the_entry_one_gets(self, place: Place, store: Store) -> None:
        await store.apply([Put("a", b"\x00one", ttl=1000.0), Put("b", b""), Put("c", bytes(range(256)))])
        assert await store.scan("") == await store.get(["a", "b", "c"])

    async def test_what_is_gone_is_not_found(self, place: Place, store: Store) -> None:
        await place.fill(store, ["a", "b", "c", "d"])
        await store.apply([Delete("a"), Delete("c"), Put("d", b"", ttl=-1.0)])
        assert keys_of(await store.scan("")) == ["b"]
        assert keys_of(await store.scan("", newest_first=True)) == ["b"]
        await store.apply([Put("c", b"")])
        assert keys_of(await store.scan("", after="b")) == ["c"]

    async def test_an_empty_store_has_nothing(self, store: Store) -> None:
        assert await store.scan("") == []
        assert await store.scan("k", after="k1", newest_first=True) == []

    async def test_one_pass_meets_all_that_stays_while_others_come_and_go(self, place: Place, store: Store) -> None:
        other = await place.connect()
        staying = sorted(f"k/{number:03}" for number in range(0, 200, 2))
        await place.fill(store, staying)
        found: list[str] = []
        number = 1
        while page := await store.scan("k/", after=found[-1] if found else None, limit=10):
            found += keys_of(page)
            await other.apply([Put(f"k/{number:03}", b""), Delete(f"k/{number - 2:03}"), Put(staying[0], b"new")])
            number += 10
        assert set(staying) <= set(found)
        assert found == sorted(set(found))
