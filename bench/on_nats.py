"""NATS against nats-py by hand, a work queue on disk on both sides."""

from __future__ import annotations

import asyncio
import os
import statistics

import msgspec
import nats

from bench import engine, nats_raw, tasks
from bench.report import Report

COUNT = 20_000
CALLS = 2_000
ROUNDS = 5
SERVER = os.environ.get("PENSTOCK_BENCH_NATS", "nats://127.0.0.1:4222")
SPACE = "penstock-bench"
URL = f"{SERVER}/{SPACE}"

BODIES = [{"n": n, "name": "somebody", "value": 3.14159} for n in range(COUNT)]
ENCODED = [msgspec.json.encode(body) for body in BODIES]


def run(report: Report) -> None:
    report.title(f"NATS JetStream, {COUNT:,} messages, median of {ROUNDS} paired rounds")
    rounds = [asyncio.run(_round()) for _ in range(ROUNDS + 1)][1:]
    for what, least in (("publish_many", 0.90), ("one at a time, concurrency 100", 0.60), ("bulk 100", 0.60)):
        report.ratio(what, [one[what] for one in rounds], least)
    rate, took = asyncio.run(_calls())
    print(f"{'call, p50; 100 at once':<46} {statistics.median(took) * 1000:>30.2f} ms; {rate:,.0f}/s", flush=True)


async def _round() -> dict[str, tuple[float, float]]:
    """Ours and raw of each kind of work, one right after the other."""
    await _delete()
    try:
        raw_publish = await nats_raw.publish(SERVER, ENCODED)
        publish = await engine.publish(URL, BODIES)
        raw_consume = await nats_raw.consume(SERVER, COUNT)
        single = await engine.consume(URL, COUNT, concurrency=100)
        await engine.publish(URL, BODIES)
        bulk = await engine.consume(URL, COUNT, bulk_size=100)
    finally:
        await _delete()
    return {
        "publish_many": (publish, raw_publish),
        "one at a time, concurrency 100": (single, raw_consume),
        "bulk 100": (bulk, raw_consume),
    }


async def _calls() -> tuple[float, list[float]]:
    await _delete()
    try:
        _, took = await tasks.rpc(URL, CALLS // 5, 1)
        rate, _ = await tasks.rpc(URL, CALLS, 100)
    finally:
        await _delete()
    return rate, took


async def _delete() -> None:
    client = await nats.connect(SERVER)
    manager = client.jsm()
    for one in await manager.streams_info():
        name = one.config.name or ""
        if name.startswith(f"{SPACE}-") or name == nats_raw.STREAM:
            await manager.delete_stream(name)
    await client.close()
