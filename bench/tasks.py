"""Tasks and calls through Penstock."""

from __future__ import annotations

import asyncio
import time

from penstock import App, Client

TASK = "penstock.bench.task"


async def rpc(url: str, count: int, together: int) -> tuple[float, list[float]]:
    """Calls a second, `together` at a time, and the seconds that each took; server and client on connections of
    their own."""
    app = App(url)

    @app.task(TASK, concurrency=together)
    async def echo(request: object) -> object:
        return request

    took: list[float] = []
    async with app, Client(url) as client:

        async def caller(calls: int) -> None:
            for _ in range(calls):
                start = time.perf_counter()
                await client.call(TASK, {"n": 1})
                took.append(time.perf_counter() - start)

        await caller(20)  # warm
        took.clear()
        start = time.perf_counter()
        await asyncio.gather(*(caller(count // together) for _ in range(together)))
        rate = count / (time.perf_counter() - start)
    return rate, took


async def send(url: str, count: int, together: int) -> float:
    """Tasks sent a second, `together` awaited at a time."""
    app = App(url)

    @app.task(TASK)
    async def work(request: object) -> None: ...

    async with app.client:
        await work.send({"n": 0})
        start = time.perf_counter()
        for _ in range(count // together):
            await asyncio.gather(*(work.send({"n": 1}) for _ in range(together)))
        return count / (time.perf_counter() - start)


async def run(url: str, count: int, waiting: int = 100) -> tuple[float, float]:
    """Tasks sent a second, and tasks run a second with their results stored and read back by so many who wait."""
    app = App(url)

    @app.task(TASK, concurrency=100)
    async def work(n: int) -> int:
        return n

    async with app.client:
        await work.send(0)
        start = time.perf_counter()
        handles = []
        for at in range(0, count, 500):
            handles += await asyncio.gather(*(work.send(n) for n in range(at, at + 500)))
        sent = count / (time.perf_counter() - start)

    async def wait(first: int) -> list[int]:
        return [await handle.result(120) for handle in handles[first::waiting]]

    start = time.perf_counter()
    async with app:
        results = await asyncio.gather(*(wait(first) for first in range(waiting)))
        rate = count / (time.perf_counter() - start)
    assert results == [list(range(first, count, waiting)) for first in range(waiting)]
    return sent, rate
