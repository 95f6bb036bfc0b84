"""A publisher in a process of its own: `python writer.py URL QUEUE BATCH [COUNT]`.

Prints a line of ids for each batch that was confirmed, after it was; without COUNT it never ends.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys

from penstock.brokers import registry
from penstock.message import Outgoing


async def write(url: str, queue: str, size: int, count: int | None) -> None:
    broker = registry.connect(url)
    await broker.open()
    for number in itertools.count() if count is None else range(count):
        ids = [f"{os.getpid()}-{number}-{place}" for place in range(size)]
        outcomes = await broker.publish([Outgoing(id=id, topic=queue, body=b"x" * 200) for id in ids])
        assert list(outcomes) == [None] * size, outcomes
        sys.stdout.write(" ".join(ids) + "\n")
        sys.stdout.flush()
    await broker.close()


if __name__ == "__main__":
    url, queue, size, *count = sys.argv[1:]
    asyncio.run(write(url, queue, int(size), int(count[0]) if count else None))
