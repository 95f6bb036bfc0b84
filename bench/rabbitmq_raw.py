"""What aiormq does by hand: confirmed publishing, and consuming with one acknowledgement for many."""

from __future__ import annotations

import asyncio
import time

import aiormq
from pamqp.commands import Basic


async def publish(url: str, queue: str, queue_type: str, bodies: list[bytes], together: int = 500) -> float:
    """Messages a second, each confirmed by the server, `together` confirmations awaited at a time."""
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    await channel.queue_declare(queue, durable=True, arguments={"x-queue-type": queue_type})
    properties = Basic.Properties(delivery_mode=2, content_type="application/json")

    async def one(body: bytes) -> None:
        await channel.basic_publish(body, routing_key=queue, properties=properties)

    start = time.perf_counter()
    for at in range(0, len(bodies), together):
        await asyncio.gather(*(one(body) for body in bodies[at : at + together]))
    rate = len(bodies) / (time.perf_counter() - start)
    await connection.close()
    return rate


async def consume(url: str, queue: str, count: int, prefetch: int = 256, batch: int = 100) -> float:
    """Messages a second, one acknowledgement for each `batch`."""
    connection = await aiormq.connect(url)
    channel = await connection.channel(publisher_confirms=False)
    await channel.basic_qos(prefetch_count=prefetch)
    seen = 0
    done = asyncio.Event()

    async def arrived(message: aiormq.abc.DeliveredMessage) -> None:
        nonlocal seen
        seen += 1
        if seen % batch == 0 or seen == count:
            await channel.basic_ack(message.delivery_tag or 0, multiple=True, wait=False)
        if seen == count:
            done.set()

    start = time.perf_counter()
    await channel.basic_consume(queue, arrived)
    await done.wait()
    rate = count / (time.perf_counter() - start)
    await channel.queue_delete(queue)
    await connection.close()
    return rate
