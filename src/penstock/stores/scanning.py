"""`all_under`: everything that a store has under a prefix."""

from __future__ import annotations

from penstock.stores.base import Entry, Store

PAGE = 500  # entries asked for at once


async def all_under(store: Store, prefix: str) -> list[Entry]:
    """The entries whose keys begin so, in the order of their keys. What is written meanwhile is among them or not.

    :raises BrokerUnavailable: call again later.
    """
    found: list[Entry] = []
    while True:
        page = await store.scan(prefix, after=found[-1].key if found else None, limit=PAGE)
        found += page
        if len(page) < PAGE:
            return found
