"""Cancelling: a call that is given up is done whole or not at all, and disturbs no other."""

from __future__ import annotations

import asyncio

from penstock.stores.base import Put, Store
from penstock.testing.stores.harness import Place, StorePromises


class CancellingPromises(StorePromises):
    async def test_a_cancelled_apply_was_done_or_will_never_be(self, place: Place, store: Store) -> None:
        for turns in range(12):
            key = f"k{turns}"
            applying = asyncio.create_task(store.apply([Put(key, b"late")]))
            for _ in range(turns):
                await asyncio.sleep(0)
            applying.cancel()
            await asyncio.wait({applying})
            await place.put(store, key, b"later")  # whatever became of the other, this comes after it
            await place.put(store, "another")
            assert await place.value(store, key) == b"later"

    async def test_the_others_of_its_company_are_not_disturbed(self, place: Place, store: Store) -> None:
        applying = [asyncio.create_task(place.put(store, f"k{number}", b"v")) for number in range(30)]
        await asyncio.sleep(0)
        for task in applying[::3]:
            task.cancel()
        await asyncio.wait(applying)
        kept = [number for number in range(30) if number % 3]
        for number in kept:
            assert not applying[number].cancelled()
            assert await place.value(store, f"k{number}") == b"v"

    async def test_a_cancelled_look_disturbs_nobody(self, place: Place, store: Store) -> None:
        await place.fill(store, ["a", "b"])
        for turns in range(6):
            looking: list[asyncio.Task[object]] = [
                asyncio.create_task(store.get(["a", "b"])),
                asyncio.create_task(store.scan("")),
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in looking:
                task.cancel()
            await asyncio.wait(looking)
            assert [entry.key for entry in await store.scan("")] == ["a", "b"]

    async def test_closing_with_calls_under_way_ends_them(self, place: Place) -> None:
        """Each ends by being done or with an error, and none hangs."""
        for turns in range(6):
            store = await place.connect()
            calls: list[asyncio.Task[object]] = [
                asyncio.create_task(store.apply([Put(f"k{number}", b"")])) for number in range(5)
            ]
            calls.append(asyncio.create_task(store.get(["k0"])))
            for _ in range(turns):
                await asyncio.sleep(0)
            await store.close()
            done, pending = await asyncio.wait(calls, timeout=place.harness.patience)
            assert not pending
            for task in done:
                task.exception()
