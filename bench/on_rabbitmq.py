"""RabbitMQ against aiormq by hand, the same queue type on both sides."""

from __future__ import annotations

import asyncio
import os
import statistics

import aiormq
import msgspec

from bench import engine, rabbitmq_raw, tasks
from bench.report import Report

COUNT = 20_000
CALLS = 5_000
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
    report.title(f"Tasks on RabbitMQ, classic queues with priorities, median of {ROUNDS} paired rounds")
    rounds = [asyncio.run(_round_of_calls()) for _ in range(ROUNDS + 1)][1:]
    latencies = [one["call, p50"] for one in rounds]
    ratio = statistics.median(ours / raw for ours, raw in latencies)
    ours, raw = (statistics.median(column) * 1000 for column in zip(*latencies, strict=True))
    report.row("call, p50", f"{ours:.2f} ms of {raw:.2f} ms raw = {ratio:.2f}", "<= 1.40 of raw", ratio <= 1.4)
    report.ratio("call, 100 at once", [one["call, 100 at once"] for one in rounds], 0.75)
    report.ratio("send, 100 gathered", [one["send, 100 gathered"] for one in rounds], 0.80)


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


async def _round_of_calls() -> dict[str, tuple[float, float]]:
    """Ours and raw, one right after the other: seconds a call, calls a second, tasks sent a second."""
    body = msgspec.json.encode({"n": 1})
    await _delete()
    try:
        _, raw_took = await rabbitmq_raw.rpc(SERVER, RAW_QUEUE, CALLS // 5, 1, body)
        _, took = await tasks.rpc(SERVER, CALLS // 5, 1)
        raw_rate, _ = await rabbitmq_raw.rpc(SERVER, RAW_QUEUE, CALLS, 100, body)
        rate, _ = await tasks.rpc(SERVER, CALLS, 100)
        raw_sent = await rabbitmq_raw.publish(SERVER, RAW_QUEUE, "classic", [body] * CALLS, 100)
        sent = await tasks.send(SERVER, CALLS, 100)
    finally:
        await _delete()
    return {
        "call, p50": (statistics.median(took), statistics.median(raw_took)),
        "call, 100 at once": (rate, raw_rate),
        "send, 100 gathered": (sent, raw_sent),
    }


async def _delete() -> None:
    connection = await aiormq.connect(SERVER)
    channel = await connection.channel()
    for queue in (engine.QUEUE, tasks.TASK):
        for one in (queue, f"{queue}.suspects", f"{queue}.dead"):
            await channel.queue_delete(one)
    await channel.queue_delete(RAW_QUEUE)
    await connection.close()
