"""What nats-py does by hand: confirmed publishing, and pull batches that are acknowledged one by one."""

from __future__ import annotations

import asyncio
import time

import nats
from nats.errors import TimeoutError as NothingThere
from nats.js.api import AckPolicy, ConsumerConfig, RetentionPolicy, StreamConfig

STREAM = "penstock-bench-raw"
SUBJECT = "penstock-bench-raw.work"
DURABLE = "worker"


async def publish(url: str, bodies: list[bytes], together: int = 500) -> float:
    """Messages a second into a fresh work queue, each confirmed by the server, `together` awaited at a time."""
    client = await nats.connect(url)
    js = client.jetstream()
    await js.add_stream(StreamConfig(name=STREAM, subjects=[SUBJECT], retention=RetentionPolicy.WORK_QUEUE))
    start = time.perf_counter()
    for at in range(0, len(bodies), together):
        await asyncio.gather(*(js.publish(SUBJECT, body) for body in bodies[at : at + together]))
    rate = len(bodies) / (time.perf_counter() - start)
    await client.close()
    return rate


async def consume(url: str, count: int, batch: int = 256) -> float:
    """Messages a second, fetched `batch` at a time, every one acknowledged, the last of each batch confirmed."""
    client = await nats.connect(url)
    js = client.jetstream()
    config = ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, max_ack_pending=-1)
    subscription = await js.pull_subscribe(SUBJECT, DURABLE, config=config)
    seen = 0
    start = time.perf_counter()
    while seen < count:
        try:
            messages = await subscription.fetch(min(batch, count - seen), timeout=5)
        except NothingThere:
            continue
        for message in messages[:-1]:
            await message.ack()
        await messages[-1].ack_sync()
        seen += len(messages)
    rate = count / (time.perf_counter() - start)
    await js.delete_stream(STREAM)
    await client.close()
    return rate
