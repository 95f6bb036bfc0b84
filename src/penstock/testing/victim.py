"""A consumer to be killed: `python -m penstock.testing.victim URL QUEUE COUNT LEASE`.

It takes COUNT messages of QUEUE, prints their ids as one line of JSON and holds them until it dies.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

import msgspec

from penstock.brokers import registry
from penstock.brokers.base import Queue


def killed(url: str) -> Callable[[str, int, float], Awaitable[list[str]]]:
    """A `Harness.crash_consumer` for a system that other processes reach by `url`."""

    async def crash(queue: str, count: int, lease: float) -> list[str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, url, queue, str(count), str(lease), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            line = await process.stdout.readline()
        finally:
            process.kill()
            await process.communicate()
        return msgspec.json.decode(line, type=list[str])

    return crash


async def hold(url: str, queue: str, count: int, lease: float) -> None:
    broker = registry.connect(url)
    await broker.open()
    subscription = broker.subscribe([Queue(queue)], prefetch=count, lease=lease, on_lost=lambda lost: None)
    held: list[str] = []
    while len(held) < count:
        held += [delivery.id for delivery in await subscription.receive(count, 60.0)]
    sys.stdout.write(msgspec.json.encode(held).decode() + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    url, queue, count, lease = sys.argv[1:]
    asyncio.run(hold(url, queue, int(count), float(lease)))
