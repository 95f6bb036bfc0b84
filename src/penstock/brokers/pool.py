"""`Pool`: the brokers that one app or client uses, each connected on first use."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from penstock.brokers import registry
from penstock.brokers.base import Broker
from penstock.config import mask
from penstock.errors import ConfigError, near

log = logging.getLogger("penstock")

OnOpen = Callable[[str | None, str | None, Broker], Awaitable[None]]


class Pool:
    """Brokers by name (None: the main one) and vhost (None: the URL's). For one event loop at a time.

    `on_open(name, vhost, broker)` runs once after a broker has connected, before anybody uses it.
    """

    def __init__(self, url: str, named: Mapping[str, str] | None = None, on_open: OnOpen | None = None) -> None:
        self.urls: dict[str | None, str] = {None: url}
        self.urls.update(named or {})
        for one in self.urls.values():
            registry.check(one)
        self._on_open = on_open
        self._brokers: dict[tuple[str | None, str | None], Broker] = {}
        self._opened: set[int] = set()
        self._opening = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self, name: str | None) -> None:
        """:raises ConfigError: no broker of that name (the near one is suggested)."""
        if name not in self.urls:
            named = [known for known in self.urls if known is not None]
            raise ConfigError(f"no broker is named {name!r}{near(str(name), named)}: give it in App(brokers={{…}})")

    async def get(self, name: str | None = None, vhost: str | None = None) -> Broker:
        """A connected broker.

        :raises BrokerUnavailable: not reachable now; ask again.
        :raises BrokerRefused: never going to work.
        """
        broker = self._brokers.get((name, vhost))
        if broker is not None and id(broker) in self._opened:
            return broker
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a lock that was ever waited for belongs to its loop
            self._loop, self._opening = loop, asyncio.Lock()
        async with self._opening:
            broker = self._brokers.get((name, vhost))  # another may have made it, or closed it, meanwhile
            if broker is None:
                self.check(name)
                broker = self._brokers[name, vhost] = registry.connect(self.urls[name], vhost=vhost)
            if id(broker) not in self._opened:
                await broker.open()
                if self._on_open is not None:
                    await self._on_open(name, vhost, broker)
                self._opened.add(id(broker))
                log.debug("connected to %s", mask(self.urls[name]))
            return broker

    async def close(self) -> None:
        """Disconnect. Idempotent; a later `get` connects again."""
        brokers = list(self._brokers.values())
        self._brokers.clear()
        self._opened.clear()
        for broker in brokers:
            await broker.close()
