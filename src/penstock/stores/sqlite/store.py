"""The contract on a SQLite file."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from urllib.parse import quote

from penstock.sqlite.address import parse_address
from penstock.sqlite.file import SqliteFile, Transaction
from penstock.stores.base import Change, Entry, StoreCapabilities
from penstock.stores.keys import check_keys
from penstock.stores.sqlite import operations
from penstock.stores.sqlite.operations import Sweeper
from penstock.stores.sqlite.watch import SqliteWatch


class SqliteStore:
    """`sqlite:///relative.db` or `sqlite:////absolute.db`, optionally `?vhost=namespace`.

    A broker on the same file may be in the same process: what both want written goes into the same
    transactions. Times to live are measured by the machine's clock, `time.time()`: where it is set
    forward by an hour entries expire an hour early, where it is set back an hour late. What has
    expired is removed while other entries are changed.
    """

    capabilities = StoreCapabilities(durable=True, shared=True)

    def __init__(self, url: str) -> None:
        self.path, self.namespace = parse_address(url)
        self._prefix = quote(self.namespace, safe="") + "/"  # without a slash in it: no two are alike
        self._file: SqliteFile | None = None
        self._sweeper = Sweeper()
        self._watches: set[SqliteWatch] = set()

    @property
    def file(self) -> SqliteFile:
        self._disown()
        if self._file is None:
            self._file = SqliteFile.lease(self.path)
        return self._file

    async def open(self) -> None:
        await self.file.submit(lambda tx: None, lambda tx: True)

    async def close(self) -> None:
        self._disown()
        await asyncio.gather(*(watch.close() for watch in tuple(self._watches)))
        file, self._file = self._file, None
        if file is not None:
            await file.drop()

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        check_keys(keys)
        if not keys:
            return []
        look = partial(operations.get, prefix=self._prefix, keys=tuple(keys))
        return await self.file.submit(look, look)  # looking needs no transaction

    async def apply(self, changes: Sequence[Change]) -> list[int | None]:
        check_keys([change.key for change in changes])
        if not changes:
            return []
        return await self.file.submit(partial(self._apply, changes=tuple(changes)))

    async def scan(
        self, prefix: str, *, after: str | None = None, limit: int = 100, newest_first: bool = False
    ) -> list[Entry]:
        look = partial(
            operations.scan, prefix=self._prefix, begin=prefix, after=after, limit=limit, newest_first=newest_first
        )
        return await self.file.submit(look, look)

    def watch(self) -> SqliteWatch:
        watch = SqliteWatch(self.file, self._prefix, self._watches)
        self._watches.add(watch)
        return watch

    def _disown(self) -> None:
        """In the child of a fork: the file and the watches are the parent's."""
        if self._file is not None and self._file.orphaned:
            self._file = None
            self._watches.clear()

    def _apply(self, tx: Transaction, changes: Sequence[Change]) -> list[int | None]:
        outcomes = operations.apply(tx, self._prefix, changes)
        self._sweeper.sweep(tx)
        return outcomes
