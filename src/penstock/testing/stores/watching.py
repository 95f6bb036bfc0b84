"""Watches under load: nothing told is missed, however it falls in time; and nothing piles up."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

from penstock.stores.base import ABSENT, Delete, Put, Store, Watch
from penstock.testing.stores.harness import Place, StorePromises


class WatchingPromises(StorePromises):
    async def test_no_change_is_missed_between_following_and_receiving(self, place: Place, store: Store) -> None:
        """Whoever follows, reads, and then waits sees every change: in the reading or by being told."""
        other = await place.connect()
        for number in range(30):
            key = f"k{number}"
            putting = asyncio.create_task(place.put(other, key, tell=True))
            for _ in range(number % 6):
                await asyncio.sleep(0)
            watch = await place.following(store, key)
            if await place.get(store, key) is None:
                await place.hear(watch, key)
            assert await place.get(store, key) is not None
            await putting
            await watch.close()

    async def test_waiting_for_the_last_of_many_changes_sees_it(self, place: Place, store: Store) -> None:
        """The wait of everybody above: look, and look again whenever something was told."""
        other = await place.connect()
        thread, far = await place.elsewhere()

        async def write(by: Store, key: str) -> None:
            for number in range(100):
                await by.apply([Put(key, str(number).encode(), tell=True)])

        async def wait(key: str) -> None:
            watch = await place.following(store, key)
            while await place.value(store, key) != b"99":
                await place.hear(watch, key)

        async with asyncio.timeout(place.harness.patience):
            await asyncio.gather(wait("near"), wait("far"), write(other, "near"), thread.run(write(far, "far")))

    async def test_a_ball_thrown_between_two_loops_is_never_dropped(self, place: Place, store: Store) -> None:
        thread, far = await place.elsewhere()
        turns = 60

        async def play(by: Store, mine: str, theirs: str) -> int:
            watch = await place.following(by, theirs)
            last = 0
            for turn in range(1, turns + 1):
                await by.apply([Put(mine, str(turn).encode(), tell=True)])
                while int(await place.value(by, theirs) or b"0") < turn:
                    await place.hear(watch, theirs)
                last = turn
            await watch.close()
            return last

        both = await asyncio.gather(play(store, "a", "b"), thread.run(play(far, "b", "a")))
        assert list(both) == [turns, turns]

    async def test_a_cancelled_receive_loses_nothing(self, place: Place, store: Store) -> None:
        watch = await place.following(store, *(f"k{number}" for number in range(60)))
        heard: set[str] = set()
        for number in range(60):
            receiving = asyncio.create_task(watch.receive(place.harness.patience))
            await asyncio.sleep(0)
            putting = asyncio.create_task(place.put(store, f"k{number}", tell=True))
            for _ in range(number % 8):
                await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.wait({receiving})
            heard |= set() if receiving.cancelled() else receiving.result()
            await putting
        missing = {f"k{number}" for number in range(60)} - heard
        await place.hear(watch, *missing)

    async def test_a_cancelled_follow_can_be_repeated(self, place: Place, store: Store) -> None:
        for turns in range(8):
            watch = store.watch()
            following = asyncio.create_task(watch.follow(["k"]))
            for _ in range(turns):
                await asyncio.sleep(0)
            following.cancel()
            await asyncio.wait({following})
            await watch.follow(["k"])
            await place.put(store, "k", tell=True)
            await place.hear(watch, "k")
            await watch.close()

    async def test_closing_in_the_middle_of_anything_ends_it(self, place: Place, store: Store) -> None:
        for turns in range(8):
            watch = store.watch()
            following = asyncio.create_task(watch.follow(["k"]))
            receiving = asyncio.create_task(watch.receive(place.harness.patience))
            for _ in range(turns):
                await asyncio.sleep(0)
            await watch.close()
            async with asyncio.timeout(place.harness.patience / 2):
                await asyncio.wait({following})
                await receiving

    async def test_thousands_of_keys_can_be_followed_each_is_heard(self, place: Place, store: Store) -> None:
        keys = [f"run/{number:05}" for number in range(5000)]
        watch = await place.following(store, *keys)
        other = await place.connect()
        await place.put(other, keys[1234], tell=True)
        await place.hear(watch, keys[1234])
        await place.fill(other, keys, tell=True)
        await place.hear(watch, *keys)
        watch.unfollow(keys[1:])
        await place.fill(other, keys, tell=True)
        await place.hear(watch, keys[0])
        watch.unfollow(keys)
        assert await watch.receive(place.harness.quiet) == set()

    async def test_what_nobody_takes_does_not_pile_up(self, place: Place, store: Store) -> None:
        """However many changes are told while nobody receives, the watch keeps a name for each key it follows."""
        watch = await place.following(store, "k0", "k1")
        await self._tell(place, store, 200)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            await self._tell(place, store, 4000)
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert grown < 200_000
        await place.hear(watch, "k0", "k1")

    async def test_watches_that_come_and_go_leave_nothing(self, place: Place, store: Store) -> None:
        async def some(number: int) -> None:
            for _ in range(number):
                watch = await place.following(store, *(f"run/{key}" for key in range(50)))
                await watch.close()

        await some(5)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            await some(40)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert grown < 200_000

    async def test_two_tasks_may_wait_on_one_watch(self, place: Place, store: Store) -> None:
        watch = await place.following(store, "k")
        receiving = [await place.blocked(watch), await place.blocked(watch)]
        await place.put(store, "k", tell=True)
        done, _ = await asyncio.wait(receiving, timeout=place.harness.patience / 2, return_when=asyncio.FIRST_COMPLETED)
        assert {"k"} in [task.result() for task in done]
        await watch.close()
        await asyncio.gather(*receiving)

    async def test_of_those_who_wait_for_an_absent_entry_each_gets_it_in_turn(self, place: Place, store: Store) -> None:
        """A lock made of put-if-absent, delete and watch: all get in, never two together."""
        inside = 0

        async def work(by: Store) -> None:
            nonlocal inside
            watch = await place.following(by, "lock")
            while (version := await place.one(by, Put("lock", b"", expect=ABSENT))) is None:
                await self._wait(watch, place)
            inside += 1
            assert inside == 1
            await asyncio.sleep(0)
            inside -= 1
            entry = await place.get(by, "lock")
            assert entry is not None
            assert entry.version == version
            await self._release(by, version)

        stores = [store, *(await asyncio.gather(*(place.connect() for _ in range(5))))]
        async with asyncio.timeout(place.harness.patience):
            await asyncio.gather(*(work(one) for one in stores))
        assert inside == 0

    async def _tell(self, place: Place, store: Store, times: int) -> None:
        for number in range(times // 100):
            await store.apply([Put(f"k{at % 3}", b"", tell=True) for at in range(number, number + 100)])

    async def _wait(self, watch: Watch, place: Place) -> None:
        assert await watch.receive(place.harness.patience), "nobody told of the lock"

    async def _release(self, store: Store, version: int) -> None:
        assert await store.apply([Delete("lock", expect=version, tell=True)]) == [0]
