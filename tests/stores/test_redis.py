"""Redis keeps the contract of a store: the whole suite on the real server; and what is its own."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.brokers.redis import RedisBroker
from penstock.errors import BrokerRefused, BrokerUnavailable
from penstock.redis.link import Link
from penstock.redis.listening import Listening
from penstock.stores import registry
from penstock.stores.base import Put, StoreCapabilities, Watch
from penstock.stores.redis import RedisStore
from penstock.testing.conformance.harness import message
from penstock.testing.faults import Proxy, RedisNode
from penstock.testing.stores import StoreConformance, StoreHarness
from tests.helpers import eventually
from tests.servers import require


class TestRedisStore(StoreConformance):
    @pytest.fixture
    def harness(self, redis_url: str) -> StoreHarness:
        return StoreHarness(connect=lambda: RedisStore(redis_url))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RedisNode]:
    require("redis")
    with RedisNode(tmp_path / "redis") as node:
        yield node


@pytest.mark.blocks
@pytest.mark.parametrize(
    ("settings", "durable"),
    [
        ({}, True),
        ({"no_appendfsync_on_rewrite": "yes"}, False),
        ({"appendfsync": "everysec"}, False),
        ({"appendonly": "no"}, False),
    ],
    ids=["always", "not always", "everysec", "no file"],
)
async def test_it_is_as_durable_as_the_server_says(tmp_path: Path, settings: dict[str, Any], durable: bool) -> None:
    require("redis")
    with RedisNode(tmp_path / "redis", **settings) as node:
        store, broker = RedisStore(node.url()), RedisBroker(node.url())
        for one in (store, broker):
            await one.open()
            assert one.capabilities.durable is durable
            await one.close()
    assert store.capabilities == StoreCapabilities(durable=durable, shared=True)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+unix", "unix"])
def test_the_registry_knows_it(scheme: str) -> None:
    assert isinstance(registry.connect(f"{scheme}:///{'run/redis.sock' if 'unix' in scheme else ''}"), RedisStore)
    assert registry.serves(f"{scheme}://h/")


@pytest.mark.blocks
async def test_no_version_comes_twice_to_a_key_even_after_everything_was_forgotten(node: RedisNode) -> None:
    store = RedisStore(node.url())
    versions = []
    for _ in range(3):
        versions += await store.apply([Put("epoch", b"")])
        node.ask("FLUSHALL")
    node.kill()
    shutil.rmtree(node.folder / "appendonlydir")
    node.start()
    await asyncio.sleep(0.05)  # to hear of it
    versions += await store.apply([Put("epoch", b"")])
    assert None not in versions
    assert versions == sorted(set(versions), key=lambda version: version or 0)
    await store.close()


async def hear_of_all(watch: Watch) -> None:
    """Also of what was told of earlier changes, and comes late."""
    while True:
        await watch.receive(10.0)


@pytest.mark.blocks
async def test_a_watch_says_that_it_may_have_missed_something_and_hears_again(node: RedisNode) -> None:
    other = RedisStore(node.url())
    async with Proxy(node.port) as proxy:
        store = RedisStore(node.url(port=proxy.port))
        watch = store.watch()
        await watch.follow(["a", "b"])
        for _ in range(3):
            receiving = asyncio.create_task(hear_of_all(watch))
            await asyncio.sleep(0)
            proxy.cut()
            with pytest.raises(BrokerUnavailable, match="unheard"):
                async with asyncio.timeout(10):
                    await receiving

            async def heard() -> bool:
                await other.apply([Put("b", b"", tell=True)])
                try:
                    return "b" in await watch.receive(0.1)
                except BrokerUnavailable:
                    return False

            await eventually(heard)
        await store.close()
    await other.close()


@pytest.mark.blocks
async def test_who_follows_first_after_an_outage_connects_every_watch(
    node: RedisNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.redis.listening.backoff_delay", lambda *_: 3600.0)
    store = RedisStore(node.url())
    first, second, third = store.watch(), store.watch(), store.watch()
    await first.follow(["a"])
    await second.follow(["b"])
    node.kill()
    with pytest.raises(BrokerUnavailable, match="unheard"):
        await first.receive(10)
    node.start()

    async def follows() -> bool:
        try:
            await third.follow(["c"])
        except BrokerUnavailable:
            return False
        return True

    await eventually(follows)
    with pytest.raises(BrokerUnavailable, match="unheard"):
        await first.receive(10)  # it is back: what was said meanwhile went unheard
    await store.apply([Put("a", b"", tell=True), Put("c", b"", tell=True)])
    assert await first.receive(5) == {"a"}
    assert await third.receive(5) == {"c"}
    await store.close()


@pytest.mark.blocks
async def test_nothing_is_left_of_what_was_closed_while_it_connected(node: RedisNode) -> None:
    before = asyncio.all_tasks()
    for turns in range(25):
        store, broker = RedisStore(node.url()), RedisBroker(node.url())
        starting = [
            asyncio.create_task(store.watch().follow(["a"])),
            asyncio.create_task(store.apply([Put("a", b"")])),
            asyncio.create_task(broker.inbox().listen(frozenset({"a"}))),
            asyncio.create_task(broker.inbox().request(message("nowhere"), lambda error: None)),
        ]
        for _ in range(turns):
            await asyncio.sleep(0.0002)
        await store.close()
        await broker.close()
        for outcome in await asyncio.gather(*starting, return_exceptions=True):
            assert not isinstance(outcome, Exception) or isinstance(outcome, BrokerUnavailable)
        await eventually(lambda: asyncio.all_tasks() <= before)
    await eventually(lambda: "name=penstock" not in node.ask("CLIENT", "LIST"))


@pytest.mark.blocks
def test_it_may_be_opened_again_in_another_event_loop(node: RedisNode) -> None:
    store, broker = RedisStore(node.url()), RedisBroker(node.url())

    async def use() -> None:
        await asyncio.gather(*(store.watch().follow([key]) for key in "abc"))
        await asyncio.gather(*(broker.inbox().listen(frozenset({topic})) for topic in "abc"))
        assert await store.get(["a"]) == [None]
        await store.close()
        await broker.close()

    for _ in range(2):
        asyncio.run(use())


@pytest.mark.blocks
async def test_what_has_expired_is_removed_while_others_are_written(node: RedisNode) -> None:
    store = RedisStore(node.url())
    await store.apply([Put(f"k{number}", b"v", ttl=0.05) for number in range(250)])
    await asyncio.sleep(0.1)
    assert await store.scan("") == []
    for _ in range(3):  # a hundred each
        await store.apply([Put("other", b"")])
    assert node.ask("HLEN", f"{store.prefix}entries") == ":1\r\n"
    assert node.ask("ZCARD", f"{store.prefix}index") == ":1\r\n"
    assert node.ask("ZCARD", f"{store.prefix}expiring") == ":0\r\n"
    await store.close()


async def test_many_who_change_at_once_share_a_round_trip(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RedisStore(redis_url)
    await store.open()
    asked = 0
    run = Link.run

    async def counted(link: Link, *words: object) -> object:
        nonlocal asked
        asked += 1
        return await run(link, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(Link, "run", counted)
    outcomes = await asyncio.gather(*(store.apply([Put(f"k{number % 50}", b"")]) for number in range(300)))
    versions = [version for [version] in outcomes]
    assert len(set(versions)) == 300
    assert asked == 1
    monkeypatch.setattr("penstock.stores.redis.store.MAX_CHANGES", 100)
    assert None not in await store.apply([Put(f"k{number}", b"") for number in range(250)])
    assert asked == 4, "no script makes more changes than that"
    await store.close()


async def test_closing_ends_what_is_under_way(redis_url: str) -> None:
    store = RedisStore(redis_url)
    watch = store.watch()
    following = asyncio.create_task(watch.follow(["a"]))
    getting = asyncio.create_task(store.get(["a"]))
    for _ in range(3):
        await asyncio.sleep(0)
    await store.close()
    async with asyncio.timeout(5):
        for outcome in await asyncio.gather(following, getting, return_exceptions=True):
            assert outcome is None or outcome == [None] or isinstance(outcome, BrokerUnavailable)
    assert await store.get(["a"]) == [None]  # it may be opened again
    await store.close()


async def test_somebody_elses_keys_under_our_names_are_refused(redis_url: str) -> None:
    store = RedisStore(redis_url)
    link = Link(store.address)
    await link.call("SET", f"{store.prefix}entries", "theirs")
    with pytest.raises(BrokerRefused, match="something else under a key of ours"):
        await store.get(["a"])
    link.close()
    await store.close()


async def test_who_listens_in_the_moment_in_which_a_connection_is_made_waits_for_nothing(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of connecting and word of it there is a turn of the event loop, which must be given."""
    store = RedisStore(redis_url)
    await store.open()
    connect, late = Listening._connect, []

    async def connect_and_listen(listening: Listening) -> None:
        await connect(listening)
        late.append(asyncio.create_task(watch.follow(["second"])))  # it runs before what is called at our end

    monkeypatch.setattr(Listening, "_connect", connect_and_listen)
    watch = store.watch()
    async with asyncio.timeout(10):
        await watch.follow(["first"])
        await asyncio.gather(*late)
        await store.apply([Put("second", b"", tell=True)])
        assert await watch.receive(10) == {"second"}
    await store.close()
