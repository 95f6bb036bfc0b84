"""A disk that fills up and gets room again: `python full_disk.py DIRECTORY BALLAST`, run on a small file system.

Removing the file BALLAST is what makes room. Ends with exit code 0 if every promise was kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from penstock.errors import BrokerUnavailable
from penstock.stores.base import Delete, Put
from penstock.stores.sqlite import SqliteStore


async def fill(store: SqliteStore) -> dict[str, bytes]:
    """What was confirmed before there was no more room; each batch puts two entries."""
    confirmed: dict[str, bytes] = {}
    while True:
        batch = {f"{len(confirmed) + at:05}": os.urandom(20_000) for at in range(2)}
        try:
            await store.apply([Put(key, value) for key, value in batch.items()])
        except BrokerUnavailable:
            return confirmed
        confirmed |= batch


async def promises(directory: Path, ballast: Path) -> None:
    store = SqliteStore(f"sqlite:///{directory}/store.db")
    await store.open()
    confirmed = await fill(store)
    assert confirmed
    watch = store.watch()
    with contextlib.suppress(BrokerUnavailable):  # following is a write too
        await watch.follow(["room"])
    found = await store.get(sorted(confirmed))
    assert {entry.key: entry.value for entry in found if entry is not None} == confirmed
    assert await store.scan("", after=max(confirmed)) == []
    ballast.unlink()
    await watch.follow(["room"])
    assert await store.apply([Put("room", b"again", tell=True)]) != [None]
    assert await watch.receive(10.0) == {"room"}
    assert len(await store.scan("", limit=10_000)) == len(confirmed) + 1
    assert await store.apply([Delete(key) for key in confirmed]) == [0] * len(confirmed)
    [check] = await store.file.submit(lambda tx: tx.execute("PRAGMA integrity_check").fetchall())
    assert check == ("ok",), check
    await store.close()


if __name__ == "__main__":
    asyncio.run(promises(Path(sys.argv[1]), Path(sys.argv[2])))
