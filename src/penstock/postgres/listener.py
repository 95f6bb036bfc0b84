"""`Listener`: the one connection on which notifications come, made again whenever it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from penstock.clock import backoff_delay
from penstock.errors import BrokerError, BrokerUnavailable
from penstock.postgres.address import Address
from penstock.postgres.errors import translate
from penstock.postgres.pool import CLOSE_TIMEOUT, connect, end, unheard

if TYPE_CHECKING:
    from asyncpg import Connection

log = logging.getLogger("penstock.postgres")

BACKOFF = (0.1, 3.0)  # seconds between tries to connect again, first and longest
LOOK = 10.0  # seconds between looks whether a silent line is still one
WITHIN = 5.0  # seconds for an answer

Hear = Callable[[str], None]


class Listener:
    """Channels, and who hears what comes on each. For one event loop.

    `back` is called whenever the connection has been made again: anything may have gone unheard.
    """

    def __init__(self, address: Address, back: Callable[[], None]) -> None:
        self._address = address
        self._back = back
        self._channels: dict[str, Hear] = {}
        self._heard_of: set[str] = set()  # channels, on this connection
        self._connection: Connection | None = None
        self._using = asyncio.Lock()
        self._lost = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._reaching: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    async def listen(self, channel: str, hear: Hear) -> None:
        """When it returns, whatever is committed from now on is heard. Idempotent.

        :raises BrokerUnavailable: call again later.
        """
        if self._closed or (channel in self._channels and channel in self._heard_of and self.connected):
            return
        self._channels[channel] = hear
        self._keeping = self._keeping or asyncio.create_task(self._keep(), name="penstock-listener")
        reaching = asyncio.create_task(self._reach(channel))
        self._reaching.add(reaching)
        reaching.add_done_callback(self._reaching.discard)
        reaching.add_done_callback(unheard)
        try:
            await asyncio.shield(reaching)
        except asyncio.CancelledError:
            if reaching.cancelled() and self._closed:
                raise BrokerUnavailable("closed while it was connecting") from None
            raise

    async def forget(self, channel: str) -> None:
        """Hear nothing of a channel any more. Never fails."""
        if self._channels.pop(channel, None) is None:
            return
        async with self._using:
            self._heard_of.discard(channel)
            if self._connection is not None and not self._closed:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(WITHIN):
                        await self._connection.remove_listener(channel, self._heard)

    async def close(self) -> None:
        """Idempotent, and for good."""
        self._closed = True
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        try:
            if self._reaching:  # a connection that is being made now would be nobody's
                await asyncio.wait(self._reaching, timeout=CLOSE_TIMEOUT)
        finally:
            late = tuple(self._reaching)
            for one in late:
                one.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            connection, self._connection = self._connection, None
            if connection is not None:
                await end(connection)

    async def _reach(self, channel: str) -> None:
        async with self._using:
            if self._closed:
                return
            if not self.connected:
                await self._connect()
                return
            assert self._connection is not None
            try:
                async with asyncio.timeout(WITHIN):
                    await self._connection.add_listener(channel, self._heard)
                self._heard_of.add(channel)
            except Exception as error:
                self._connection.terminate()
                raise translate(error, self._address.shown) from None

    async def _connect(self) -> None:
        """A connection that hears all channels."""
        connection = await connect(self._address)
        channels = tuple(self._channels)
        try:
            async with asyncio.timeout(WITHIN):
                for channel in channels:
                    await connection.add_listener(channel, self._heard)
        except BaseException as error:
            connection.terminate()
            if isinstance(error, Exception):
                raise translate(error, self._address.shown) from None
            raise
        connection.add_termination_listener(lambda _: self._lost.set())
        if self._closed:
            connection.terminate()
            return
        self._connection, self._heard_of = connection, set(channels)

    def _heard(self, connection: Any, pid: int, channel: str, payload: object) -> None:
        hear = self._channels.get(channel)
        if hear is not None:
            hear(str(payload))

    async def _keep(self) -> None:
        failures = 0
        while not self._closed:
            try:
                async with asyncio.timeout(LOOK):
                    await self._lost.wait()
            except TimeoutError:
                await self._look()
                if not self._lost.is_set():
                    continue
            self._lost.clear()
            while not self._closed:
                try:
                    async with self._using:
                        if not self.connected:
                            await self._connect()
                except BrokerError as error:
                    failures += 1
                    delay = backoff_delay(failures, BACKOFF, random.Random())  # noqa: S311 - jitter
                    log.warning("listening again in %.1f s: %s", delay, error)
                    await asyncio.sleep(delay)
                else:
                    if failures:
                        log.warning("listening again to %s", self._address.shown)
                    failures = 0
                    self._back()
                    break

    async def _look(self) -> None:
        """A line that was cut in silence says nothing of it until something is sent."""
        async with self._using:
            connection = self._connection
            if connection is None or connection.is_closed():
                self._lost.set()
                return
            try:
                await connection.execute("SELECT 1", timeout=WITHIN)
            except Exception:
                connection.terminate()
                self._lost.set()
