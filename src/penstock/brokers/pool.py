"""`Pool`: the brokers that one app or client uses, each connected on first use."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from penstock.brokers import registry
from penstock.brokers.base import Broker
from penstock.config import mask
from penstock.errors import BrokerUnavailable, ConfigError, near
from penstock.waiting import Ending

log = logging.getLogger("penstock")

OnOpen = Callable[[str | None, str | None, Broker], Awaitable[None]]


class _Here:
    """What is connected in one event loop."""

    def __init__(self) -> None:
        self.brokers: dict[tuple[str | None, str | None], Broker] = {}
        self.opened: set[Broker] = set()
        self.opening = asyncio.Lock()
        self.closings = 0
        self.ending = Ending(self.close)

    async def close(self) -> None:
        self.closings += 1
        brokers = list(self.brokers.values())
        self.brokers.clear()
        self.opened.clear()
        await asyncio.gather(*(broker.close() for broker in brokers))


class Pool:
    """Brokers by name (None: the main one) and vhost (None: the URL's). Each event loop has its own, which end with it.

    `on_open(name, vhost, broker)` runs once after a broker has connected, before anybody uses it.
    """

    def __init__(self, url: str, named: Mapping[str, str] | None = None, on_open: OnOpen | None = None) -> None:
        self.urls: dict[str | None, str] = {None: url}
        self.urls.update(named or {})
        for one in self.urls.values():
            registry.check(one)
        self._on_open = on_open
        self._in_loops: dict[asyncio.AbstractEventLoop, _Here] = {}

    def check(self, name: str | None) -> None:
        """:raises ConfigError: no broker of that name (the near one is suggested)."""
        if name not in self.urls:
            named = [known for known in self.urls if known is not None]
            raise ConfigError(f"no broker is named {name!r}{near(str(name), named)}: give it in App(brokers={{…}})")

    async def get(self, name: str | None = None, vhost: str | None = None) -> Broker:
        """A connected broker.

        :raises BrokerUnavailable: not reachable now, or closed before it was; ask again.
        :raises BrokerRefused: never going to work.
        """
        loop = asyncio.get_running_loop()
        here = self._in_loops.get(loop)
        if here is None:
            for other in [one for one in tuple(self._in_loops) if one.is_closed()]:
                self._in_loops.pop(other, None)
            here = self._in_loops[loop] = _Here()
            await here.ending.begin()
        broker = here.brokers.get((name, vhost))
        if broker is not None and broker in here.opened:
            return broker
        closings = here.closings
        async with here.opening:
            if closings == here.closings:
                broker = here.brokers.get((name, vhost))  # another may have made it meanwhile
                if broker is None:
                    self.check(name)
                    broker = here.brokers[name, vhost] = registry.connect(self.urls[name], vhost=vhost)
                if broker not in here.opened:
                    await broker.open()
                    if self._on_open is not None:
                        await self._on_open(name, vhost, broker)
                if closings == here.closings:
                    here.opened.add(broker)
                    log.debug("connected to %s", mask(self.urls[name]))
                    return broker
                await broker.close()  # what was opened after `close` had closed it
        raise BrokerUnavailable("it was closed meanwhile")

    async def close(self) -> None:
        """Disconnect, in this event loop. Idempotent; a later `get` connects again, one under way is refused."""
        here = self._in_loops.get(asyncio.get_running_loop())
        if here is not None:
            await here.close()
