"""`Keeper`: the store that an app or client uses, opened on first use."""

from __future__ import annotations

import asyncio

from penstock.config import mask
from penstock.errors import BrokerUnavailable, StoreRequired
from penstock.stores import registry
from penstock.stores.base import Store
from penstock.waiting import Ending


class _Here:
    """What is connected in one event loop."""

    def __init__(self) -> None:
        self.store: Store | None = None
        self.opened = False
        self.opening = asyncio.Lock()
        self.closings = 0
        self.ending = Ending(self.close)

    async def close(self) -> None:
        self.closings += 1
        store, self.store, self.opened = self.store, None, False
        if store is not None:
            await store.close()


class Keeper:
    """A store by its URL; None: there is none. Each event loop has its own, which ends with it.

    :raises ConfigError: a URL that no adapter serves.
    """

    def __init__(self, url: str | None, store: Store | None = None) -> None:
        self.url = url
        if url is not None and store is None:
            registry.check(url)
        self._given = store
        self._in_loops: dict[asyncio.AbstractEventLoop, _Here] = {}

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
        :raises BrokerUnavailable: not reachable now, or closed before it was; ask again.
        :raises BrokerRefused: never going to work.
        """
        loop = asyncio.get_running_loop()
        here = self._in_loops.get(loop)
        if here is None:
            self.require("this")
            for other in [one for one in tuple(self._in_loops) if one.is_closed()]:
                self._in_loops.pop(other, None)
            here = self._in_loops[loop] = _Here()
            await here.ending.begin()
        if here.store is not None and here.opened:
            return here.store
        closings = here.closings
        async with here.opening:
            if closings == here.closings:
                if here.store is None:  # it stays until it is closed: whoever is cancelled here leaves nothing behind
                    here.store = self._given or registry.connect(str(self.url))
                store = here.store
                if not here.opened:
                    await store.open()
                if closings == here.closings:
                    here.opened = True
                    return store
                await store.close()  # what was opened after `close` had closed it
        raise BrokerUnavailable("the store was closed meanwhile")

    async def close(self) -> None:
        """Disconnect, in this event loop. Idempotent; a later `get` connects again, one under way is refused."""
        here = self._in_loops.get(asyncio.get_running_loop())
        if here is not None:
            await here.close()
