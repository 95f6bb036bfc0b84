"""PostgreSQL against asyncpg by hand, and against Procrastinate where that is installed."""

from __future__ import annotations

import asyncio
import os
import statistics

import asyncpg
import msgspec

from bench import engine, postgres_raw, procrastinate_peer, tasks
from bench.report import Report

COUNT = 20_000
PEER_COUNT = 3_000
ROUNDS = 5
BACKLOG = int(os.environ.get("PENSTOCK_BENCH_BACKLOG", "1000000"))
DSN = os.environ.get("PENSTOCK_BENCH_POSTGRES", "postgresql://penstock:penstock@127.0.0.1:5432/penstock")
SCHEMA = "penstock_bench"
URL = f"{DSN}?schema={SCHEMA}"

BODIES = [{"n": n, "name": "somebody", "value": 3.14159} for n in range(COUNT)]
ENCODED = [msgspec.json.encode(body) for body in BODIES]


def run(report: Report) -> None:
    report.title(f"PostgreSQL, synchronous_commit=on, {COUNT:,} messages, median of {ROUNDS} paired rounds")
    rounds = [asyncio.run(_round()) for _ in range(ROUNDS + 1)][1:]
    for what, least in (("publish_many", 0.20), ("one at a time, concurrency 100", 0.40), ("bulk 100", 0.50)):
        report.ratio(what, [one[what] for one in rounds], least)
    rate = statistics.median(one["one at a time, concurrency 100"][0] for one in rounds)
    report.row("one at a time, concurrency 100", f"{rate:,.0f}/s", ">= 15,000/s", rate >= 15_000)
    peer = asyncio.run(procrastinate_peer.consume(DSN, PEER_COUNT))
    if peer is None:
        report.row("Procrastinate, concurrency 100", "not installed", "", True)
    else:
        report.row("Procrastinate, concurrency 100", f"{peer:,.0f}/s, {rate / peer:.0f}x", "10x", rate >= 10 * peer)
    sent, done = asyncio.run(_tasks())
    report.row("tasks sent, 500 gathered", f"{sent:,.0f}/s", "", True)
    report.row("tasks run, results stored", f"{done:,.0f}/s", "", True)
    small, large = asyncio.run(_backlog(10_000)), asyncio.run(_backlog(BACKLOG))
    figure = f"{large:,.0f}/s of {small:,.0f}/s"
    report.row(f"backlog of {BACKLOG:,} against 10,000", figure, ">= 0.90", large >= 0.9 * small)


async def _round() -> dict[str, tuple[float, float]]:
    """Ours and raw of each kind of work, one right after the other."""
    connection = await postgres_raw.connect(DSN)
    await _drop()
    try:
        raw_publish = await postgres_raw.publish(connection, ENCODED)
        publish = await engine.publish(URL, BODIES)
        raw_consume = await postgres_raw.consume(connection)
        single = await engine.consume(URL, COUNT, concurrency=100)
        await engine.publish(URL, BODIES)
        bulk = await engine.consume(URL, COUNT, bulk_size=100)
    finally:
        await postgres_raw.close(connection)
        await _drop()
    return {
        "publish_many": (publish, raw_publish),
        "one at a time, concurrency 100": (single, raw_consume),
        "bulk 100": (bulk, raw_consume),
    }


async def _tasks() -> tuple[float, float]:
    await _drop()
    try:
        return await tasks.run(URL, COUNT // 4)
    finally:
        await _drop()


async def _backlog(size: int) -> float:
    """Messages a second for the first ten thousand of a backlog; median of three."""
    rates = []
    for _ in range(3):
        await _drop()
        for start in range(0, size, COUNT):
            await engine.publish(URL, BODIES[: min(COUNT, size - start)])
        rates.append(await engine.consume(URL, 10_000, concurrency=100))
    await _drop()
    return statistics.median(rates)


async def _drop() -> None:
    connection = await asyncpg.connect(DSN)
    await connection.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
    await connection.close()
