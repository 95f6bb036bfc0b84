"""A store in a process of its own: `python changer.py URL PREFIX KEYS [COUNT]`.

Puts `PREFIX<number modulo KEYS>` again and again with `tell`, the number as its value, and prints the number
once it is confirmed; without COUNT it never ends.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

from penstock.stores import registry
from penstock.stores.base import Put


async def change(url: str, prefix: str, keys: int, count: int | None) -> None:
    store = registry.connect(url)
    await store.open()
    for number in itertools.count() if count is None else range(count):
        [version] = await store.apply([Put(f"{prefix}{number % keys}", str(number).encode(), tell=True)])
        assert version is not None
        sys.stdout.write(f"{number} {version}\n")
        sys.stdout.flush()
    await store.close()


if __name__ == "__main__":
    url, prefix, keys, *count = sys.argv[1:]
    asyncio.run(change(url, prefix, int(keys), int(count[0]) if count else None))
