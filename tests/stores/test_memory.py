"""The memory store keeps the contract; and what is its own: who shares it, whose time it is, what it forgets."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading

import pytest

from penstock.errors import ConfigError
from penstock.stores import registry
from penstock.stores.base import ABSENT, Delete, Put, Touch
from penstock.stores.memory import MemoryStore, MemoryStoreServer, SortedKeys
from penstock.testing.stores import StoreConformance, StoreHarness
from penstock.testing.virtual import EPOCH, VirtualClock, VirtualLoop, run_virtual

_names = itertools.count()


def fresh_url() -> str:
    return f"memory://stores-{next(_names)}"


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def harness(self) -> StoreHarness:
        url = fresh_url()
        return StoreHarness(connect=lambda: MemoryStore(url))


class SetClock:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


# -- addresses


async def knows(url: str) -> bool:
    return (await registry.connect(url).get(["k"]))[0] is not None


async def test_all_who_name_it_share_it_and_nobody_else() -> None:
    url = fresh_url()
    await registry.connect(url).apply([Put("k", b"")])
    assert await knows(url)
    for other in (fresh_url(), f"{url}/path", f"{url}?vhost=red", "memory://", "memory://"):
        assert not await knows(other)


async def test_without_a_name_it_is_nobody_elses() -> None:
    mine = MemoryStore()
    await mine.apply([Put("k", b"")])
    assert await mine.get(["k"]) != [None]
    assert await MemoryStore().get(["k"]) == [None]


async def test_namespaces_are_kept_apart() -> None:
    url = fresh_url()
    await registry.connect(f"{url}?vhost=red").apply([Put("k", b"")])
    assert await knows(f"{url}?vhost=/red/")
    assert not await knows(f"{url}?vhost=blue")
    assert not await knows(url)


def test_an_unknown_option_is_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"no option 'vhosts' \(did you mean 'vhost'\?\)"):
        MemoryStore("memory://name?vhosts=red")


@pytest.mark.parametrize(
    ("url", "answer"),
    [
        ("memroy://", r"no store for memroy:// URLs \(did you mean 'memory'\?\); there are memory, "),
        ("amqp://127.0.0.1/", r"no store for amqp:// URLs; there are memory, "),
        ("memory", r"not a URL"),
    ],
)
def test_a_scheme_that_no_store_serves_is_refused_with_the_near_one(url: str, answer: str) -> None:
    for look in (registry.check, registry.connect):
        with pytest.raises(ConfigError, match=answer):
            look(url)


# -- time


async def test_what_has_expired_is_gone_at_the_very_moment_and_kept_until_then() -> None:
    clock = SetClock()
    store = MemoryStore(server=MemoryStoreServer(clock))
    await store.apply([Put("k", b"", ttl=10.0)])
    clock.now += 9.999
    assert await store.get(["k"]) != [None]
    clock.now = 1010.0
    assert await store.get(["k"]) == [None]
    assert await store.scan("") == []
    assert await store.apply([Touch("k", 5.0), Delete("k", expect=1), Put("k", b"", expect=ABSENT)]) == [None, None, 2]


def test_a_simulation_supplies_the_time() -> None:
    async def main(loop: VirtualLoop) -> None:
        store = MemoryStore(server=MemoryStoreServer(VirtualClock(loop)))
        await store.apply([Put("k", b"", ttl=3600.0)])
        [entry] = await store.get(["k"])
        assert entry is not None
        assert entry.expires_at == EPOCH + 3600.0
        watch = store.watch()
        await watch.follow(["k"])
        assert await watch.receive(3599.0) == set()
        assert await store.get(["k"]) != [None]
        await asyncio.sleep(1.0)
        assert await store.get(["k"]) == [None]

    run_virtual(main)


# -- memory


async def test_what_has_expired_takes_no_room() -> None:
    clock = SetClock()
    store = MemoryStore(server=MemoryStoreServer(clock))
    for number in range(100):
        await store.apply([Put(f"k{number}-{at}", b"x", ttl=5.0) for at in range(100)])
        clock.now += 1.0
    assert len(store.server) <= 600
    clock.now += 5.0
    await store.get([])
    assert len(store.server) == 0


async def test_touching_and_replacing_for_ever_takes_no_room() -> None:
    server = MemoryStoreServer()
    store = MemoryStore(server=server)
    for number in range(200):
        await store.apply([Touch("k", 1000.0), Put("k", b"", ttl=1000.0), Put(f"{number}", b"", ttl=1000.0)] * 10)
        await store.apply([Delete(f"{number}")])
    assert len(server) == 1
    assert len(server._expiring) < 200


async def test_a_value_is_a_copy() -> None:
    store, value = MemoryStore(), bytearray(b"abc")
    await store.apply([Put("k", value)])  # type: ignore[arg-type]  # as a careless caller would
    value[0] = 0
    [entry] = await store.get(["k"])
    assert entry is not None
    assert entry.value == b"abc"


async def test_a_watch_that_was_closed_is_forgotten() -> None:
    store = MemoryStore()
    for _ in range(10):
        watch = store.watch()
        await watch.follow(["a", "b"])
        await watch.close()
        await watch.follow(["a"])
    assert not store._watches
    assert not store.server._followers


# -- the order of keys


def test_sorted_keys_are_those_of_a_sorted_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SortedKeys, "MOST", 7)
    rng = random.Random(5)
    keys, plain = SortedKeys(), set[str]()
    universe = ["", *(f"{number:02}" for number in range(99)), "\U0010ffff"]
    for step in range(4000):
        key = rng.choice(universe)
        if key in plain and (rng.random() < 0.5 or step > 3000):
            plain.discard(key)
            keys.remove(key)
        elif key not in plain and step <= 3000:
            plain.add(key)
            keys.add(key)
        bound = rng.choice(universe)
        assert list(keys.upwards(bound)) == sorted(one for one in plain if one >= bound)
        assert list(keys.downwards(bound)) == sorted((one for one in plain if one < bound), reverse=True)
        assert list(keys.downwards(None)) == sorted(plain, reverse=True)


# -- threads


async def test_threads_that_change_one_entry_at_once_lose_nothing() -> None:
    url = fresh_url()

    async def count() -> None:
        store = MemoryStore(url)
        for _ in range(300):
            done: int | None = None
            while done is None:
                [entry] = await store.get(["n"])
                value, version = (0, ABSENT) if entry is None else (int(entry.value), entry.version)
                [done] = await store.apply([Put("n", str(value + 1).encode(), expect=version)])

    threads = [threading.Thread(target=lambda: asyncio.run(count())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    [entry] = await MemoryStore(url).get(["n"])
    assert entry is not None
    assert entry.value == b"1200"
