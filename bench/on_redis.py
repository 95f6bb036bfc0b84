"""Redis Streams against redis-py by hand, on the same server of our own, with the same fsync policy."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import msgspec

from bench import engine, redis_raw, tasks
from bench.report import Report
from penstock.stores.base import Put
from penstock.stores.redis import RedisStore
from penstock.testing.faults import RedisNode

COUNT = 20_000
CALLS = 5_000
ROUNDS = 5

BODIES = [{"n": n, "name": "somebody", "value": 3.14159} for n in range(COUNT)]
ENCODED = [msgspec.json.encode(body) for body in BODIES]
RESULT = b'{"value": 3.14159, "name": "somebody"}' * 5


def run(report: Report) -> None:
    for policy in ("everysec", "always"):
        with tempfile.TemporaryDirectory() as folder, RedisNode(Path(folder) / "redis", appendfsync=policy) as node:
            _measure(report, policy, node.url())


def _measure(report: Report, policy: str, url: str) -> None:
    report.title(f"Redis, appendfsync {policy}, {COUNT:,} messages, median of {ROUNDS} paired rounds")
    rounds = [asyncio.run(_round(url)) for _ in range(ROUNDS + 1)][1:]
    for what, least in (("publish_many", 0.90), ("one at a time, concurrency 100", 0.45), ("bulk 100", 0.60)):
        report.ratio(what, [one[what] for one in rounds], least)
    stored = statistics.median(asyncio.run(_store(url)) for _ in range(3))
    report.row("results stored, 500 gathered", f"{stored:,.0f}/s", ">= 20,000/s", stored >= 20_000)
    sent, done = asyncio.run(tasks.run(url, COUNT // 4))
    report.row("tasks sent, 500 gathered", f"{sent:,.0f}/s", "", True)
    report.row("tasks run, each waited for", f"{done:,.0f}/s", "", True)
    _, took = asyncio.run(tasks.rpc(url, CALLS // 5, 1))
    report.row("call, p50", f"{statistics.median(took) * 1000:.2f} ms", "", True)
    rate, _ = asyncio.run(tasks.rpc(url, CALLS, 100))
    report.row("call, 100 at once", f"{rate:,.0f}/s", "", True)


async def _round(url: str) -> dict[str, tuple[float, float]]:
    """Ours and raw of each kind of work, one right after the other."""
    raw_publish = await redis_raw.publish(url, ENCODED)
    publish = await engine.publish(url, BODIES)
    raw_consume = await redis_raw.consume(url, COUNT)
    single = await engine.consume(url, COUNT, concurrency=100)
    await engine.publish(url, BODIES)
    bulk = await engine.consume(url, COUNT, bulk_size=100)
    return {
        "publish_many": (publish, raw_publish),
        "one at a time, concurrency 100": (single, raw_consume),
        "bulk 100": (bulk, raw_consume),
    }


async def _store(url: str) -> float:
    """Results a second, each a change of its own, 500 of them asked for at once."""
    store = RedisStore(url)
    await store.open()
    start = time.perf_counter()
    for at in range(0, COUNT, 500):
        puts = (Put(f"run/{number}", RESULT, ttl=3600.0, tell=True) for number in range(at, at + 500))
        await asyncio.gather(*(store.apply([put]) for put in puts))
    rate = COUNT / (time.perf_counter() - start)
    await store.close()
    return rate
