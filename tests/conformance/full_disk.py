"""A disk that fills up and gets room again: `python full_disk.py DIRECTORY BALLAST`, run on a small file system.

Removing the file BALLAST is what makes room. Ends with exit code 0 if every promise was kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from penstock.brokers.base import Ack, Queue
from penstock.brokers.sqlite import SqliteBroker
from penstock.errors import BrokerUnavailable, StorageFull
from penstock.message import Delivery, Outgoing


async def fill(broker: SqliteBroker) -> list[str]:
    """The ids that were confirmed before there was no more room."""
    confirmed: list[str] = []
    while True:
        id = str(len(confirmed))
        [outcome] = await broker.publish([Outgoing(id=id, topic="work", body=os.urandom(20_000))])
        if outcome is not None:
            assert isinstance(outcome, StorageFull), repr(outcome)
            return confirmed
        confirmed.append(id)


async def promises(directory: Path, ballast: Path) -> None:
    broker = SqliteBroker(f"sqlite:///{directory}/queue.db")
    await broker.declare(Queue("work"))
    confirmed = await fill(broker)
    assert confirmed
    subscription = broker.subscribe([Queue("work")], prefetch=1000, lease=30.0, on_lost=lambda lost: None)
    taken: list[Delivery] = []
    with contextlib.suppress(BrokerUnavailable):  # taking a message is a write too
        taken += await subscription.receive(1, 0)
    ballast.unlink()
    [outcome] = await broker.publish([Outgoing(id="room", topic="work", body=b"again")])
    assert outcome is None, repr(outcome)
    while found := await subscription.receive(1000, 0.2):
        taken += found
    assert sorted(one.id for one in taken) == sorted([*confirmed, "room"])
    assert not await subscription.settle([Ack(one) for one in taken])
    [check] = await broker.run(lambda tx: tx.execute("PRAGMA integrity_check").fetchall())
    assert check == ("ok",), check
    await broker.close()


if __name__ == "__main__":
    asyncio.run(promises(Path(sys.argv[1]), Path(sys.argv[2])))
