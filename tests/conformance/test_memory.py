"""The memory broker keeps the contract; and what is its own: who shares it."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from penstock.brokers import registry
from penstock.brokers.base import Broker, Queue
from penstock.brokers.memory import MemoryBroker
from penstock.errors import ConfigError, Unroutable
from penstock.testing.conformance import Conformance, Harness
from penstock.testing.conformance.harness import System, acks, ids, message, messages

_names = itertools.count()


def fresh_url() -> str:
    return f"memory://conformance-{next(_names)}"


class TestMemory(Conformance):
    @pytest.fixture
    def harness(self) -> Harness:
        url = fresh_url()
        return Harness(connect=lambda: MemoryBroker(url))


async def has_queue(broker: Broker, name: str) -> bool:
    [outcome] = await broker.publish([message(name)])
    assert outcome is None or isinstance(outcome, Unroutable)
    return outcome is None


async def test_all_who_name_it_share_it() -> None:
    url = fresh_url()
    await registry.connect(url).declare(Queue("work"))
    assert await has_queue(registry.connect(url), "work")


async def test_other_names_and_paths_are_other_systems() -> None:
    url = fresh_url()
    await registry.connect(url).declare(Queue("work"))
    for other in (fresh_url(), f"{url}/path", "memory://", "memory://"):
        assert not await has_queue(registry.connect(other), "work")


async def test_without_a_name_it_is_nobody_elses() -> None:
    mine, yours = registry.connect("memory://"), registry.connect("memory://")
    await mine.declare(Queue("work"))
    assert await has_queue(mine, "work")
    assert not await has_queue(yours, "work")


async def test_namespaces_are_kept_apart() -> None:
    url = fresh_url()
    red, blue, bare = MemoryBroker(f"{url}?vhost=red"), MemoryBroker(url, vhost="/blue"), MemoryBroker(url)
    await red.declare(Queue("work"))
    assert not await has_queue(blue, "work")
    assert not await has_queue(bare, "work")
    assert [info.name for info in await red.admin.inspect()] == ["work"]
    assert list(await blue.admin.inspect()) == []
    assert await has_queue(MemoryBroker(url, vhost="red"), "work")


def test_an_unknown_option_is_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"no option 'vhosts' \(did you mean 'vhost'\?\)"):
        MemoryBroker("memory://name?vhosts=red")


async def test_loops_in_other_threads_share_it_and_wake_each_other() -> None:
    url = fresh_url()
    queue = Queue("work")
    here = System(Harness(connect=lambda: MemoryBroker(url)))
    broker = await here.connect()
    await broker.declare(queue)
    receiving = await here.blocked(here.consume(broker, queue))

    def publish() -> None:
        async def one() -> None:
            await MemoryBroker(url).publish([message("work", id="from-afar")])

        asyncio.run(one())

    thread = threading.Thread(target=publish)
    thread.start()
    assert ids(await here.woken(receiving)) == ["from-afar"]
    await asyncio.to_thread(thread.join)
    await here.close()


async def test_threads_that_publish_and_consume_at_once_lose_nothing() -> None:
    url = fresh_url()
    await MemoryBroker(url).declare(Queue("work"))
    sent: list[str] = []
    seen: list[str] = []

    async def publish() -> None:
        broker = MemoryBroker(url)
        for _ in range(50):
            sent.extend(ids(batch := messages("work", 5)))
            assert list(await broker.publish(batch)) == [None] * 5

    async def consume() -> None:
        broker = MemoryBroker(url)
        subscription = broker.subscribe([Queue("work")], prefetch=20, lease=30.0, on_lost=lambda lost: None)
        while taken := await subscription.receive(10, 0.5):
            seen.extend(ids(taken))
            assert list(await subscription.settle(acks(taken))) == []
        await broker.close()

    threads = [threading.Thread(target=lambda w=work: asyncio.run(w())) for work in [publish] * 3 + [consume] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert sorted(seen) == sorted(sent)
    assert len(sent) == 750
