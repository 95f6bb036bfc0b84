"""`Gathered`: a store that many use at once, with few trips to it."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.stores.base import Change, Entry, Store
from penstock.stores.keys import check_keys
from penstock.waiting import Gathering

LOOKED_AT = 100  # asked for together: results of tasks may be large


class Gathered:
    """A store, in which all that one turn of the event loop asks for is one get, and all that it changes one apply.

    For one event loop.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changing: Gathering[Sequence[Change], list[int | None]] = Gathering(self._apply_groups)
        self._looking: Gathering[Sequence[str], list[Entry | None]] = Gathering(self._get_groups, LOOKED_AT)

    async def get(self, *keys: str) -> list[Entry | None]:
        """As `Store.get`.

        :raises ValueError: not keys.
        """
        check_keys(keys)  # or the others who look would be refused too
        return await self._looking.do(keys)

    async def apply(self, *changes: Change) -> list[int | None]:
        """As `Store.apply`: these together, whatever becomes of those of others."""
        return await self._changing.do(changes)

    async def _get_groups(self, groups: Sequence[Sequence[str]]) -> list[list[Entry | None]]:
        found = iter(await self._store.get([key for group in groups for key in group]))
        return [[next(found) for _ in group] for group in groups]

    async def _apply_groups(self, groups: Sequence[Sequence[Change]]) -> list[list[int | None]]:
        outcomes = iter(await self._store.apply([change for group in groups for change in group]))
        return [[next(outcomes) for _ in group] for group in groups]
