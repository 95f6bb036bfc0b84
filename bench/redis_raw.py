"""What redis-py does by hand: a pipelined stream, and batches read, acknowledged and deleted."""

from __future__ import annotations

import time

from redis.asyncio import Redis

STREAM, GROUP = "bench-raw", "raw"


async def publish(url: str, bodies: list[bytes], together: int = 500) -> float:
    """Messages a second, `together` in a pipeline."""
    client = Redis.from_url(url)
    await client.delete(STREAM)
    await client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    start = time.perf_counter()
    for at in range(0, len(bodies), together):
        pipeline = client.pipeline(transaction=False)
        for body in bodies[at : at + together]:
            pipeline.xadd(STREAM, {"body": body})
        await pipeline.execute()
    rate = len(bodies) / (time.perf_counter() - start)
    await client.aclose()
    return rate


async def consume(url: str, count: int, batch: int = 100) -> float:
    """Messages a second: a batch is read, and then acknowledged and deleted in one pipeline."""
    client = Redis.from_url(url)
    seen = 0
    start = time.perf_counter()
    while seen < count:
        [(_, entries)] = await client.xreadgroup(GROUP, "raw", {STREAM: ">"}, count=batch)
        ids = [id for id, _ in entries]
        pipeline = client.pipeline(transaction=False)
        pipeline.xack(STREAM, GROUP, *ids)
        pipeline.xdel(STREAM, *ids)
        await pipeline.execute()
        seen += len(ids)
    rate = count / (time.perf_counter() - start)
    await client.aclose()
    return rate
