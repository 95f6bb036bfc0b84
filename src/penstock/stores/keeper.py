"""`Keeper`: the store that an app or client uses, opened on first use."""

from __future__ import annotations

import asyncio

from penstock.config import mask
from penstock.errors import StoreRequired
from penstock.stores import registry
from penstock.stores.base import Store


class Keeper:
    """A store by its URL; None: there is none. For one event loop at a time.

    :raises ConfigError: a URL that no adapter serves.
    """

    def __init__(self, url: str | None, store: Store | None = None) -> None:
        self.url = url
        if url is not None and store is None:
            registry.check(url)
        self._given = store
        self._store: Store | None = None
        self._opening = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __bool__(self) -> bool:
        """Whether there is one."""
        return self.url is not None or self._given is not None

    def __str__(self) -> str:
        return "no store" if self.url is None else mask(self.url)

    def require(self, what: str) -> None:
        """:raises StoreRequired: there is none."""
        if not self:
            raise StoreRequired(what)

    async def get(self) -> Store:
        """The store, connected.

        :raises StoreRequired: there is none.
        :raises BrokerUnavailable: not reachable now; ask again.
        :raises BrokerRefused: never going to work.
        """
        if self._store is not None:
            return self._store
        self.require("this")
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a lock that was ever waited for belongs to its loop
            self._loop, self._opening = loop, asyncio.Lock()
        async with self._opening:
            if self._store is None:
                store = self._given or registry.connect(str(self.url))
                await store.open()
                self._store = store
            return self._store

    async def close(self) -> None:
        """Disconnect. Idempotent; a later `get` connects again."""
        store, self._store = self._store, None
        if store is not None:
            await store.close()
