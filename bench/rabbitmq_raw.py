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


async def rpc(url: str, queue: str, count: int, together: int, body: bytes) -> tuple[float, list[float]]:
    """Direct reply-to by hand, server and client on a connection each: calls a second, `together` at a time, and
    the seconds that each took. Requests persistent and unconfirmed, the server acknowledges each."""
    served, asking = await aiormq.connect(url), await aiormq.connect(url)
    server = await served.channel(publisher_confirms=False)
    await server.queue_declare(queue, durable=True, arguments={"x-max-priority": 10})
    await server.basic_qos(prefetch_count=together)

    async def serve(message: aiormq.abc.DeliveredMessage) -> None:
        asked = message.header.properties
        await server.basic_publish(
            message.body,
            routing_key=asked.reply_to or "",
            properties=Basic.Properties(correlation_id=asked.correlation_id, content_type="application/json"),
            wait=False,
        )
        await server.basic_ack(message.delivery_tag or 0, wait=False)

    await server.basic_consume(queue, serve)
    client = await asking.channel(publisher_confirms=False)
    waiting: dict[str, asyncio.Future[bytes]] = {}

    async def answered(message: aiormq.abc.DeliveredMessage) -> None:
        waiting.pop(str(message.header.properties.correlation_id)).set_result(message.body)

    await client.basic_consume("amq.rabbitmq.reply-to", answered, no_ack=True)
    took: list[float] = []

    async def call(number: int) -> None:
        start = time.perf_counter()
        name = str(number)
        answer = waiting[name] = asyncio.get_running_loop().create_future()
        properties = Basic.Properties(
            correlation_id=name, reply_to="amq.rabbitmq.reply-to", delivery_mode=2, content_type="application/json"
        )
        await client.basic_publish(body, routing_key=queue, properties=properties, wait=False)
        await answer
        took.append(time.perf_counter() - start)

    async def caller(numbers: range) -> None:
        for number in numbers:
            await call(number)

    await caller(range(-20, 0))  # warm
    took.clear()
    start = time.perf_counter()
    await asyncio.gather(*(caller(range(first, count, together)) for first in range(together)))
    rate = count / (time.perf_counter() - start)
    await server.queue_delete(queue)
    await served.close()
    await asking.close()
    return rate, took
