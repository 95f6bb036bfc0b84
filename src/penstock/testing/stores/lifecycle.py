"""The life of a connection: open and close, as often as one likes."""

from __future__ import annotations

import asyncio

from penstock.stores.base import Put, Store
from penstock.testing.stores.harness import Place, StorePromises


class LifecyclePromises(StorePromises):
    async def test_open_and_close_may_be_repeated(self, place: Place, store: Store) -> None:
        await store.open()
        await place.put(store, "k")
        await store.close()
        await store.close()

    async def test_a_store_that_was_never_opened_can_be_closed(self, place: Place) -> None:
        await place.harness.connect().close()

    async def test_opening_and_closing_at_the_same_time_is_doing_so_once(self, place: Place) -> None:
        store = place.harness.connect()
        await asyncio.gather(*(store.open() for _ in range(5)))
        await place.put(store, "k")
        await asyncio.gather(*(store.close() for _ in range(5)))

    async def test_a_closed_store_can_be_opened_again(self, place: Place, store: Store) -> None:
        keeper = await place.connect()
        await place.put(store, "k", b"v")
        await store.close()
        await store.open()
        assert await place.value(store, "k") == b"v"
        await keeper.close()

    async def test_two_connections_of_one_process_are_two(self, place: Place, store: Store) -> None:
        other = await place.connect()
        receiving = await place.blocked(await place.following(other, "k"))
        await store.close()
        await place.put(other, "k", b"v", tell=True)
        assert await place.woken(receiving) == {"k"}
        assert await place.value(other, "k") == b"v"

    async def test_closing_the_store_closes_its_watches(self, place: Place, store: Store) -> None:
        watch = await place.following(store, "k")
        receiving = await place.blocked(watch)
        idle = store.watch()
        other = await place.connect()
        await store.close()
        assert await place.woken(receiving) == set()
        await place.put(other, "k", tell=True)
        for closed in (watch, idle):
            async with asyncio.timeout(place.harness.patience):
                assert await closed.receive(place.harness.quiet) == set()
            await closed.close()

    async def test_what_was_confirmed_outlives_the_connection(self, place: Place, store: Store) -> None:
        keeper = None if store.capabilities.durable else await place.connect()
        version = await place.put(store, "k", b"v")
        await store.close()
        entry = await place.get(keeper or await place.connect(), "k")
        assert entry is not None
        assert (entry.value, entry.version) == (b"v", version)

    async def test_capabilities_are_the_same_on_every_connection(self, place: Place, store: Store) -> None:
        assert (await place.connect()).capabilities == store.capabilities

    async def test_many_short_lives_leave_the_store_usable(self, place: Place, store: Store) -> None:
        for number in range(8):
            short = await place.connect()
            watch = await place.following(short, "k")
            await short.apply([Put("k", str(number).encode(), tell=True)])
            await place.hear(watch, "k")
            await short.close()
        assert await place.value(store, "k") == b"7"
