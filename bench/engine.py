"""The same work through Penstock."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from penstock import App, Message

QUEUE = "penstock.bench"


async def publish(url: str, bodies: list[Any]) -> float:
    """Messages a second through `publish_many`."""
    app = App(url)

    @app.route(QUEUE)
    async def handle(message: Message) -> None: ...

    async with app.client:
        await app.publish_many(QUEUE, bodies[:1])  # connecting and declaring is not what is measured
        start = time.perf_counter()
        await app.publish_many(QUEUE, bodies[1:])
        return (len(bodies) - 1) / (time.perf_counter() - start)


async def consume(url: str, count: int, **options: Any) -> float:
    """Messages a second, `count` of them, from the first handler call to the last settlement; the handler does
    nothing."""
    app = App(url)
    left, start = count, 0.0
    done = asyncio.Event()

    def seen(number: int) -> None:
        nonlocal left, start
        start = start or time.perf_counter()
        left -= number
        if left <= 0:
            done.set()

    async def batches(messages: list[Message]) -> None:
        seen(len(messages))

    async def singles(message: Message) -> None:
        seen(1)

    app.route(QUEUE, **options)(batches if "bulk_size" in options else singles)
    async with app:
        await done.wait()
    return count / (time.perf_counter() - start)
