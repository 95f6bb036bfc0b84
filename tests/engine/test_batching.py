"""Who is woken for what waits to be run."""

from __future__ import annotations

import asyncio

from penstock.delivery.batching import Buffer
from tests.helpers import eventually

ITEMS = range(20)


async def test_what_one_takes_without_waiting_wakes_nobody_else() -> None:
    buffer: Buffer[int] = Buffer()
    taken: list[tuple[int, int]] = []

    async def work(number: int) -> None:
        while True:
            taken.append((number, await buffer.get()))

    workers = [asyncio.create_task(work(number)) for number in range(5)]
    await asyncio.sleep(0)
    buffer.put(ITEMS)
    await eventually(lambda: len(taken) == len(ITEMS))
    assert taken == [(0, item) for item in ITEMS]
    for worker in workers:
        worker.cancel()


async def test_as_many_as_are_wanted_work_at_once() -> None:
    buffer: Buffer[int] = Buffer()
    at_work: set[int] = set()
    go_on = asyncio.Event()

    async def work() -> None:
        while True:
            at_work.add(await buffer.get())
            await go_on.wait()

    workers = [asyncio.create_task(work()) for _ in range(5)]
    await asyncio.sleep(0)
    buffer.put(ITEMS)
    await eventually(lambda: at_work == set(ITEMS[:5]))
    go_on.set()
    await eventually(lambda: at_work == set(ITEMS))
    for worker in workers:
        worker.cancel()


async def test_the_turn_of_one_that_is_cancelled_goes_to_another() -> None:
    buffer: Buffer[int] = Buffer()
    first, second = (asyncio.create_task(buffer.get()) for _ in range(2))
    await asyncio.sleep(0)
    buffer.put([1])
    first.cancel()
    assert await asyncio.wait_for(second, 5) == 1
    assert first.cancelled()
