"""RabbitMQ against aiormq by hand, the same queue type on both sides."""

from __future__ import annotations

import asyncio
import os

import aiormq
import msgspec

from bench import engine, rabbitmq_raw
from bench.report import Report

COUNT = 20_000
ROUNDS = 5
SERVER = os.environ.get("PENSTOCK_BENCH_AMQP", "amqp://guest:guest@127.0.0.1:5672/")
RAW_QUEUE = "penstock.bench.raw"

BODIES = [{"n": n, "name": "somebody", "value": 3.14159} for n in range(COUNT)]
ENCODED = [msgspec.json.encode(body) for body in BODIES]


def run(report: Report) -> None:
    for queue_type in ("quorum", "classic"):
        report.title(f"RabbitMQ, {queue_type} queues, {COUNT:,} messages, median of {ROUNDS} paired rounds")
        rounds = [asyncio.run(_round(queue_type)) for _ in range(ROUNDS + 1)][1:]
        for what, least in (("publish_many", 0.90), ("one at a time, concurrency 100", 0.75), ("bulk 100", 0.85)):
            report.ratio(what, [one[what] for one in rounds], least)


async def _round(queue_type: str) -> dict[str, tuple[float, float]]:
    """Ours and raw of each kind of work, one right after the other."""
    url = f"{SERVER}?queue_type={queue_type}"
    await _delete()
    try:
        raw_publish = await rabbitmq_raw.publish(SERVER, RAW_QUEUE, queue_type, ENCODED)
        publish = await engine.publish(url, BODIES)
        raw_consume = await rabbitmq_raw.consume(SERVER, RAW_QUEUE, COUNT)
        single = await engine.consume(url, COUNT, concurrency=100)
        await engine.publish(url, BODIES)
        bulk = await engine.consume(url, COUNT, bulk_size=100)
    finally:
        await _delete()
    return {
        "publish_many": (publish, raw_publish),
        "one at a time, concurrency 100": (single, raw_consume),
        "bulk 100": (bulk, raw_consume),
    }


async def _delete() -> None:
    connection = await aiormq.connect(SERVER)
    channel = await connection.channel()
    for queue in (RAW_QUEUE, engine.QUEUE, f"{engine.QUEUE}.suspects", f"{engine.QUEUE}.dead"):
        await channel.queue_delete(queue)
    await connection.close()
