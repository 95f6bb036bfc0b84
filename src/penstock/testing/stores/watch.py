"""Watches: which changes are heard of, and by whom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from penstock.stores.base import Change, Delete, Put, Store, Touch, Watch
from penstock.testing.stores.harness import Place, StorePromises

ATTEMPTS = 5  # of which one has to be prompt: a busy machine may delay the others

CAUSES: dict[str, Callable[[int], Change]] = {
    "a put": lambda version: Put("k", b"new", tell=True),
    "a put over a version": lambda version: Put("k", b"new", expect=version, tell=True),
    "a delete": lambda version: Delete("k", tell=True),
    "a delete of a version": lambda version: Delete("k", expect=version, tell=True),
}


class WatchPromises(StorePromises):
    @pytest.mark.parametrize("local", [True, False], ids=["same connection", "another connection"])
    @pytest.mark.parametrize("cause", CAUSES)
    async def test_a_waiting_watch_hears_at_once(self, place: Place, store: Store, cause: str, local: bool) -> None:
        watch = await place.following(store if local else await place.connect(), "k")
        for _ in range(ATTEMPTS):
            version = await place.put(store, "k")
            receiving = await place.blocked(watch)
            began = time.monotonic()
            assert await place.one(store, CAUSES[cause](version)) is not None
            assert await place.woken(receiving) == {"k"}
            if time.monotonic() - began < place.harness.prompt:
                return
        pytest.fail(f"none of {ATTEMPTS} changes was heard of within {place.harness.prompt:g} s")

    async def test_what_is_heard_of_can_be_read(self, place: Place, store: Store) -> None:
        other = await place.connect()
        watch = await place.following(other, "k")
        for number in range(20):
            await place.put(store, "k", str(number).encode(), tell=True)
            await place.hear(watch, "k")
            assert await place.value(other, "k") == str(number).encode()

    async def test_changes_that_do_not_tell_are_silent(self, place: Place, store: Store) -> None:
        watch = await place.following(store, "k")
        version = await place.put(store, "k")
        await store.apply([Put("k", b"", expect=version), Touch("k", 1000.0), Delete("k")])
        assert await watch.receive(place.harness.quiet) == set()

    async def test_what_was_refused_is_silent(self, place: Place, store: Store) -> None:
        await place.put(store, "k")
        watch = await place.following(store, "k")
        await store.apply([Put("k", b"", expect=10**9, tell=True), Delete("k", expect=10**9, tell=True)])
        assert await watch.receive(place.harness.quiet) == set()

    async def test_other_keys_are_silent(self, place: Place, store: Store) -> None:
        watch = await place.following(store, "k", "k/2")
        await store.apply([Put(key, b"", tell=True) for key in ("", "K", "k/", "k/1", "k/22")])
        assert await watch.receive(place.harness.quiet) == set()

    async def test_before_following_nothing_is_heard(self, place: Place, store: Store) -> None:
        watch = store.watch()
        assert await watch.receive(0.0) == set()
        await place.put(store, "k", tell=True)
        await watch.follow(["k"])
        assert await watch.receive(place.harness.quiet) == set()
        await place.put(store, "k", tell=True)
        await place.hear(watch, "k")

    async def test_a_key_told_while_nobody_receives_is_heard_later(self, place: Place, store: Store) -> None:
        watch = await place.following(store, "a", "b", "c")
        await store.apply([Put("a", b"", tell=True), Put("c", b"", tell=True), Put("c", b"", tell=True)])
        await place.hear(watch, "a", "c")
        assert await watch.receive(place.harness.quiet) == set()

    async def test_a_key_that_is_not_there_can_be_followed(self, place: Place, store: Store) -> None:
        watch = await place.following(store, "k")
        version = await place.put(store, "k", tell=True)
        await place.hear(watch, "k")
        await place.one(store, Delete("k", expect=version, tell=True))
        await place.hear(watch, "k")

    async def test_following_can_be_extended_and_repeated(self, place: Place, store: Store) -> None:
        watch = await place.following(store, "a")
        await watch.follow(["b", "a"])
        await watch.follow([])
        await watch.follow(key for key in ("c",))
        await store.apply([Put(key, b"", tell=True) for key in "abcd"])
        await place.hear(watch, "a", "b", "c")

    async def test_unfollowed_keys_are_heard_no_more(self, place: Place, store: Store) -> None:
        watch = await place.following(store, "a", "b", "c")
        watch.unfollow(["b", "never followed"])
        await store.apply([Put(key, b"", tell=True) for key in "abc"])
        await place.hear(watch, "a", "c")
        await store.apply([Put("a", b"", tell=True), Put("c", b"", tell=True)])
        watch.unfollow(["a", "b"])
        assert await watch.receive(place.harness.patience) == {"c"}
        watch.unfollow(["c"])
        await store.apply([Put(key, b"", tell=True) for key in "abc"])
        assert await watch.receive(place.harness.quiet) == set()
        await watch.follow(["b"])
        await place.put(store, "b", tell=True)
        await place.hear(watch, "b")

    async def test_every_watch_that_follows_a_key_hears(self, place: Place, store: Store) -> None:
        other = await place.connect()
        watches = [await place.following(one, "k", f"own{at}") for at, one in enumerate([store, store, other])]
        await place.put(store, "k", tell=True)
        for watch in watches:
            await place.hear(watch, "k")
        watches[0].unfollow(["k"])
        await watches[1].close()
        await place.put(other, "k", tell=True)
        await place.hear(watches[2], "k")
        assert await watches[0].receive(place.harness.quiet) == set()

    async def test_a_receive_waits_no_longer_than_it_says(self, place: Place, store: Store) -> None:
        watch = await place.following(store, "k")
        for wait in (0.0, -1.0, place.harness.quiet):
            began = time.monotonic()
            assert await watch.receive(wait) == set()
            assert max(wait, 0.0) * 0.9 <= time.monotonic() - began < wait + place.harness.patience

    async def test_hearing_once_does_not_shorten_the_next_wait(self, place: Place, store: Store) -> None:
        """A wake-up that is already answered for must not end a later `receive` early."""
        watch = await place.following(store, "k")
        for _ in range(5):
            await place.put(store, "k", tell=True)
            assert await watch.receive(place.harness.patience) == {"k"}
            began = time.monotonic()
            assert await watch.receive(place.harness.quiet) == set()
            assert time.monotonic() - began >= place.harness.quiet * 0.9

    async def test_close_is_idempotent_and_wakes_a_blocked_receive(self, place: Place, store: Store) -> None:
        watch = await place.following(store, "k")
        receiving = await place.blocked(watch)
        await asyncio.gather(watch.close(), watch.close())
        await watch.close()
        assert await place.woken(receiving) == set()
        await place.put(store, "k", tell=True)
        async with asyncio.timeout(place.harness.patience):
            assert await watch.receive(place.harness.quiet) == set()

    async def test_a_watch_that_was_never_used_can_be_closed(self, store: Store) -> None:
        watch = store.watch()
        watch.unfollow(["k"])
        await watch.close()

    async def test_a_closed_watch_follows_nothing(self, place: Place, store: Store) -> None:
        watch: Watch = store.watch()
        await watch.close()
        await watch.follow(["k"])
        await place.put(store, "k", tell=True)
        async with asyncio.timeout(place.harness.patience):
            assert await watch.receive(place.harness.quiet) == set()
