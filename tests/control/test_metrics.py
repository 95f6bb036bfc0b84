"""Metrics: true, bounded, still there after a restart, and readable by Prometheus whatever queues are called."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from penstock import App, Message
from penstock.brokers import registry as brokers
from penstock.brokers.base import Broker, Queue
from penstock.control.metrics import (
    INTERVAL,
    KEPT,
    MOST_QUEUES,
    PREFIX,
    STEP,
    Metrics,
    QueueSample,
    Sample,
    Sampler,
)
from penstock.errors import BrokerUnavailable
from penstock.message import Outgoing
from penstock.stores import registry
from penstock.stores.base import Put
from penstock.stores.memory import MemoryStore, MemoryStoreServer
from penstock.testing.virtual import VirtualClock, VirtualLoop, run_virtual


def samples(clock: VirtualClock, **fields: Any) -> Callable[[], Awaitable[Sample]]:
    async def take() -> Sample:
        return Sample(**{"at": clock.time(), "node": "n", "uptime": clock.monotonic(), **fields})

    return take


async def run_for(metrics: Metrics, seconds: float) -> None:
    running = asyncio.create_task(metrics.run())
    await asyncio.sleep(seconds)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


# -- the history


def test_one_a_minute_is_kept_and_none_beyond_a_day() -> None:
    async def main(loop: VirtualLoop) -> None:
        clock = VirtualClock(loop)
        store = MemoryStore("memory://", server=MemoryStoreServer(clock))
        await store.open()
        metrics = Metrics(store, samples(clock), clock)
        await run_for(metrics, 2.2 * KEPT)
        kept = await metrics.history()
        assert KEPT / STEP - 3 <= len(kept) <= KEPT / STEP + 1
        apart = {round(later.at - earlier.at) for earlier, later in itertools.pairwise(kept)}
        assert apart <= {45, 60, 75}
        assert len(await store.scan(PREFIX, limit=10_000)) <= KEPT / STEP + 1
        last_hour = await metrics.history(clock.time() - 3600)
        assert [one.at for one in last_hour] == [one.at for one in kept if one.at > clock.time() - 3600]
        assert 58 <= len(last_hour) <= 61
        assert metrics.now is not None
        assert clock.time() - metrics.now.at <= INTERVAL

    run_virtual(main)


async def test_the_history_survives_a_restart_and_knows_its_nodes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'metrics.db'}"
    for node in ("a", "b", "a"):
        store = registry.connect(url)
        await store.open()
        await Metrics(store, Sampler(node, no_broker)).take()
        await store.close()
    store = registry.connect(url)
    await store.open()
    metrics = Metrics(store, Sampler("a", no_broker))
    assert [one.node for one in await metrics.history()].count("a") == 2
    assert [one.node for one in await metrics.history(node="b")] == ["b"]
    assert await metrics.history(since=(await metrics.history())[-1].at) == []
    await store.close()


async def test_what_cannot_be_read_hides_nothing_else(tmp_path: Path) -> None:
    store = registry.connect(f"sqlite:///{tmp_path / 'metrics.db'}")
    await store.open()
    metrics = Metrics(store, Sampler("caf\udce9", no_broker))
    await metrics.take()
    await store.apply([Put(f"{PREFIX}9999999999/x", b"nonsense")])
    assert [one.node for one in await metrics.history()] == ["caf\\udce9"]
    await store.close()


def test_a_failure_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: VirtualLoop) -> None:
        clock = VirtualClock(loop)
        store = MemoryStore("memory://", server=MemoryStoreServer(clock))
        await store.open()
        good, calls = samples(clock), 0

        async def take() -> Sample:
            nonlocal calls
            calls += 1
            if calls < 4:
                raise ValueError("no good")
            return await good()

        metrics = Metrics(store, take, clock)
        await run_for(metrics, 10 * INTERVAL)
        assert metrics.now is not None
        assert len(await metrics.history()) >= 1
        await store.close()

    run_virtual(main)
    assert caplog.text.count("metrics: ValueError: no good") == 3


def test_a_store_that_is_away_loses_no_minute_that_can_still_be_kept() -> None:
    async def main(loop: VirtualLoop) -> None:
        clock = VirtualClock(loop)
        store = MemoryStore("memory://", server=MemoryStoreServer(clock))
        await store.open()
        metrics = Metrics(store, samples(clock), clock)
        apply = store.apply

        async def away(changes: Any) -> Any:
            raise BrokerUnavailable("away")

        store.apply = away  # type: ignore[method-assign]
        with pytest.raises(BrokerUnavailable):
            await metrics.take()
        assert metrics.now is not None
        store.apply = apply  # type: ignore[method-assign]
        await metrics.take()
        assert len(await metrics.history()) == 1

    run_virtual(main)


@pytest.mark.blocks
async def test_the_lag_of_a_loop_that_was_held_up_is_seen(tmp_path: Path) -> None:
    import time

    store = registry.connect(f"memory://{tmp_path.name}")
    await store.open()
    metrics = Metrics(store, Sampler("n", no_broker))
    running = asyncio.create_task(metrics.run())
    for _ in range(100):
        await asyncio.sleep(0.02)
        if metrics.now is not None:
            break
    time.sleep(1.6)  # longer than a tick, whenever that began
    await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert (await metrics.take()).lag > 0.3
    assert (await metrics.take()).lag < 0.3
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


# -- the samples


async def no_broker() -> Broker:
    raise BrokerUnavailable("away")


async def test_a_broker_that_is_away_says_so_and_the_rest_is_known() -> None:
    sample = await Sampler("n", no_broker, counts=lambda: {"tasks_sent": 3})()
    assert (sample.broker, sample.queues, sample.counts) == (False, [], {"tasks_sent": 3})
    assert sample.rss is not None
    assert 5e6 < sample.rss < 5e9
    assert sample.cpu > 0


async def test_queues_are_counted(broker_url: str) -> None:
    app = App(broker_url)

    @app.route("orders")
    async def take(message: Message) -> None: ...

    async with app.client:
        await app.publish_many("orders", [1, 2, 3])
        sampler = Sampler("n", app.client._pool.get, lambda: ["orders", "never-declared"])
        sample = await sampler()
        while sum(one.ready or 0 for one in sample.queues if one.name == "orders") < 3:  # the server counts late
            sample = await sampler()
    assert sample.broker
    (found,) = [one for one in sample.queues if one.name == "orders"]
    assert (found.ready, found.dead) == (3, 0)


async def test_a_sample_is_bounded(tmp_path: Path) -> None:
    broker = brokers.connect(f"memory://{tmp_path.name}")
    await broker.open()
    for number in range(MOST_QUEUES + 10):
        await broker.declare(Queue(f"q{number}"))
    await broker.publish([Outgoing(id="1", topic="q1", body=b"", enqueued_at=1.0)])

    async def connected() -> Broker:
        return broker

    assert len((await Sampler("n", connected)()).queues) == MOST_QUEUES
    await broker.close()


# -- Prometheus

LINE = re.compile(
    r'(?P<name>[a-zA-Z_][a-zA-Z0-9_]*)(?:\{(?P<labels>(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (?P<value>\S+)'
)


def parsed(text: str) -> dict[str, dict[str, float]]:
    """Name → labels → value, by the grammar of the format."""
    found: dict[str, dict[str, float]] = {}
    types: set[str] = set()
    assert text.endswith("\n")
    for line in text.split("\n")[:-1]:
        if line.startswith("# TYPE "):
            name, kind = line.split(" ")[2:]
            assert name not in types, "a metric is told twice"
            assert kind in ("gauge", "counter")
            types.add(name)
        elif not line.startswith("# HELP "):
            one = LINE.fullmatch(line)
            assert one, line
            assert one["name"] in types, "told before its type"
            assert one["name"].startswith("penstock_")
            values = found.setdefault(one["name"], {})
            assert one["labels"] not in values
            values[one["labels"] or ""] = float(one["value"])
    return found


async def exposed(tmp_path: Path, **fields: Any) -> dict[str, dict[str, float]]:
    store = registry.connect(f"memory://{tmp_path.name}")
    await store.open()

    async def take() -> Sample:
        return Sample(**{"at": 1.5e9, "node": "n", "uptime": 2.0, **fields})

    metrics = Metrics(store, take)
    await metrics.take()
    return parsed(metrics.prometheus())


async def test_names_of_queues_are_escaped(tmp_path: Path) -> None:
    names = ['a"b', "a\\b", "a\nb", "ü", "caf\udce9", 'x"} 1\npenstock_broker_up 7']
    found = await exposed(tmp_path, queues=[QueueSample(name, ready=1, dead=0) for name in names])
    assert set(found["penstock_queue_ready"]) == {
        'queue="a\\"b"',
        'queue="a\\\\b"',
        'queue="a\\nb"',
        'queue="ü"',
        'queue="caf\\\\udce9"',
        'queue="x\\"} 1\\npenstock_broker_up 7"',
    }
    assert found["penstock_broker_up"] == {"": 1}
    assert "penstock_queue_unsettled" not in found, "what nobody knows is no number"


async def test_numbers_are_exposed_as_they_are(tmp_path: Path) -> None:
    counts = {"tasks_sent": 12, "calls ended_total": 3}
    found = await exposed(tmp_path, rss=5_000_000_000, cpu=1e-07, broker=False, counts=counts)
    assert found["penstock_resident_memory_bytes"] == {"": 5_000_000_000}
    assert found["penstock_cpu_seconds_total"] == {"": 1e-07}
    assert found["penstock_broker_up"] == {"": 0}
    assert found["penstock_tasks_sent_total"] == {"": 12}
    assert found["penstock_calls_ended_total"] == {"": 3}


async def test_before_the_first_sample_there_is_the_version_alone(tmp_path: Path) -> None:
    metrics = Metrics(registry.connect(f"memory://{tmp_path.name}"), Sampler("n", no_broker))
    assert set(parsed(metrics.prometheus())) == {"penstock_info"}
