"""Batches: changes are made in their order, each by itself, and one that is refused stops no other."""

from __future__ import annotations

import asyncio

from penstock.stores.base import ABSENT, Change, Delete, Put, Store, Touch
from penstock.testing.stores.harness import Place, StorePromises


class BatchPromises(StorePromises):
    async def test_an_empty_batch_is_done(self, store: Store) -> None:
        assert await store.apply([]) == []
        assert await store.apply(()) == []

    async def test_each_change_has_its_outcome_at_its_place(self, place: Place, store: Store) -> None:
        a = await place.put(store, "a", b"old")
        b = await place.put(store, "b", b"old", ttl=1000.0)
        outcomes = await store.apply(
            [
                Put("a", b"new", expect=a),
                Put("b", b"new", expect=b + 1000),
                Delete("x"),
                Delete("b", expect=ABSENT),
                Touch("b", None),
                Touch("x", 5.0),
                Put("c", b"new", expect=ABSENT),
                Put("d", b"new", expect=3),
            ]
        )
        assert [outcome is None for outcome in outcomes] == [False, True, False, True, False, True, False, True]
        assert outcomes[2] == 0
        assert outcomes[4] == b
        entries = await store.get(["a", "b", "c", "d"])
        assert [entry and (entry.value, entry.version, entry.expires_at) for entry in entries] == [
            (b"new", outcomes[0], None),
            (b"old", b, None),
            (b"new", outcomes[6], None),
            None,
        ]

    async def test_each_sees_what_those_before_it_did(self, place: Place, store: Store) -> None:
        outcomes = await store.apply(
            [
                Put("k", b"1", expect=ABSENT),
                Put("k", b"2", expect=ABSENT),
                Delete("k"),
                Delete("k", expect=ABSENT),
                Touch("k", 1000.0),
                Put("k", b"3", expect=ABSENT),
                Touch("k", 1000.0),
                Touch("k", None),
                Delete("k", expect=ABSENT),
            ]
        )
        put, again = outcomes[0], outcomes[5]
        assert put is not None
        assert again is not None
        assert again > put
        assert outcomes == [put, None, 0, 0, None, again, again, again, None]
        entry = await place.get(store, "k")
        assert entry is not None
        assert (entry.value, entry.version, entry.expires_at) == (b"3", again, None)

    async def test_the_last_of_several_to_a_key_stands(self, place: Place, store: Store) -> None:
        await place.fill(store, ["old", "touched", "deleted"])
        changes: list[list[Change]] = [
            [Put("put", b"1"), Delete("put"), Put("put", b"2", ttl=1000.0)],
            [Put("old", b"1", ttl=1.0), Touch("old", None)],
            [Touch("touched", 1.0), Touch("touched", None), Put("touched", b"1"), Touch("touched", 1000.0)],
            [Touch("deleted", 1000.0), Delete("deleted"), Touch("deleted", None)],
            [Put("gone", b"1", ttl=-1.0), Touch("gone", None), Delete("gone", expect=ABSENT)],
            [Put("brought", b"1"), Delete("brought")],
            [Put("twice", b"1"), Put("twice", b"2"), Touch("twice", 1000.0), Delete("twice"), Touch("twice", None)],
        ]
        await store.apply([change for several in changes for change in several])
        entries = await store.get(["put", "old", "touched", "deleted", "gone", "brought", "twice"])
        assert [entry and (entry.value, entry.expires_at is None) for entry in entries] == [
            (b"2", False),
            (b"1", True),
            (b"1", False),
            *[None] * 4,
        ]

    async def test_what_a_touch_ended_is_absent_for_what_follows(self, place: Place, store: Store) -> None:
        for there in (True, False):
            if there:
                await place.put(store, "k", b"old")
            changes = [] if there else [Put("k", b"old", expect=ABSENT)]
            outcomes = await store.apply(
                [*changes, Touch("k", -1.0), Touch("k", None), Put("k", b"new", expect=ABSENT), Touch("k", 0.0)]
            )
            assert [one is None for one in outcomes[-4:]] == [False, True, False, False]
            assert await place.get(store, "k") is None

    async def test_many_changes_of_all_kinds_are_as_good_as_one_after_another(self, place: Place, store: Store) -> None:
        """The same changes in one batch, and each in a batch of its own, leave the same."""
        changes: list[Change] = []
        for number in range(600):
            key = f"{number * 7 % 23}"
            kind = number % 6
            if kind in (0, 1, 4):
                changes.append(Put(key, str(number).encode(), ttl=(None, 1000.0)[number % 2]))
            elif kind == 2:
                changes.append(Put(key, str(number).encode(), expect=ABSENT))
            elif kind == 3:
                changes.append(Delete(key, expect=(None, ABSENT)[number % 2]))
            else:
                changes.append(Touch(key, (None, 1000.0)[number % 4 // 2]))
        batch = await store.apply([_renamed(change, "batch/") for change in changes])
        single = [await place.one(store, _renamed(change, "single/")) for change in changes[:200]]
        single += [outcome for at in range(200, 600, 8) for outcome in await self._some(store, changes[at : at + 8])]
        assert [one and one > 0 for one in batch] == [one and one > 0 for one in single]
        found = [
            [
                (entry.key.removeprefix(prefix), entry.value, entry.expires_at is None)
                for entry in await store.scan(prefix)
            ]
            for prefix in ("batch/", "single/")
        ]
        assert found[0] == found[1]
        assert found[0]

    async def test_batches_at_the_same_time_are_each_made_whole(self, place: Place, store: Store) -> None:
        stores = await asyncio.gather(*(place.connect() for _ in range(4)))
        keys = [f"k{number}" for number in range(40)]
        outcomes = await asyncio.gather(
            *(one.apply([Put(key, str(at).encode(), expect=ABSENT) for key in keys]) for at, one in enumerate(stores))
        )
        entries = await store.get(keys)
        for number, entry in enumerate(entries):
            assert entry is not None
            assert [outcome[number] for outcome in outcomes if outcome[number] is not None] == [entry.version]
            assert outcomes[int(entry.value)][number] == entry.version

    async def test_the_list_of_changes_is_the_callers(self, place: Place, store: Store) -> None:
        changes: list[Change] = [Put("k", b"1")]
        applying = asyncio.create_task(store.apply(changes))
        await asyncio.sleep(0)
        changes.clear()
        assert len(await applying) == 1
        assert await place.value(store, "k") == b"1"

    async def _some(self, store: Store, changes: list[Change]) -> list[int | None]:
        return await store.apply([_renamed(change, "single/") for change in changes])


def _renamed(change: Change, prefix: str) -> Change:
    if isinstance(change, Put):
        return Put(prefix + change.key, change.value, change.ttl, change.expect, change.tell)
    if isinstance(change, Delete):
        return Delete(prefix + change.key, change.expect, change.tell)
    return Touch(prefix + change.key, change.ttl)
