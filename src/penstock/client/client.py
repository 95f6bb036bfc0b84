"""`Client`: the verbs of whoever sends and does not consume."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from penstock.brokers.base import Broker
from penstock.client.listening import Listener
from penstock.client.publishing import MAX_BODY, check_text, resolve_broker
from penstock.client.tasks import Asking
from penstock.stores.ledger import Ledger
from penstock.terms import Reply
from penstock.waiting import together

T = TypeVar("T")

__all__ = ["MAX_BODY", "Client", "resolve_broker"]


class Client(Asking):
    """Publishes, sends, calls and listens. Connects on first use and never consumes.

    `url`: given, else `$PENSTOCK_BROKER`, else `penstock.toml`, else `sqlite:///penstock.db`. `store`:
    given, else `$PENSTOCK_STORE`, else `penstock.toml`, else the broker's own where that can be a store
    too. With `async with Client() as client:` the connection ends with the block; else call `close()`. It connects
    anew in each event loop; what is connected when `asyncio.run` or a `Runner` ends its loop is closed there.

    :raises ConfigError: a URL that no adapter serves.
    """

    _in_use = False
    """Its app runs, over the same connections."""
    _closing: asyncio.Future[None] | None = None
    """Done once `close`, which is under way, is over."""

    async def __aenter__(self) -> Self:
        self._listening.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect. Idempotent; the next verb connects again. While its app runs, an app's client stays connected.

        Calls under way raise `BrokerUnavailable`. A verb that begins meanwhile waits until this is done.
        """
        if self._in_use:
            return
        if self._closing is not None:
            await self._until_closed()
            return
        closing = self._closing = asyncio.get_running_loop().create_future()
        try:
            await self._disconnect()
        finally:
            self._closing = None
            closing.set_result(None)

    async def connect(self) -> None:
        """Connect now rather than on first use, and begin to hear what was subscribed to before.

        :raises BrokerUnavailable, BrokerRefused: it cannot be done.
        """
        await self._get_broker()
        self._listening.start()

    async def broadcast(self, topic: str, data: Any, *, timeout: float | None = 30) -> None:
        """Say something to whoever is subscribed to `topic` now, in whatever process. Nothing is stored, and
        nobody listening is no error.

        :raises BodyTooLarge, Unencodable: as they say.
        :raises PublishTimeout: the broker could not be reached in time.
        """
        message = self._message(topic, data, None, None, None, 0, None, None, persistent=False)
        await self._reach(lambda broker: broker.broadcast(message), timeout, None)

    def subscribe(self, topic: str, callback: Callable[[Any], Any]) -> Listener:
        """Call `callback(data)`, plain or async, with what is broadcast to `topic` from now on.

        Allowed before there is an event loop or a connection: it comes to life with the first verb,
        `connect()` or `async with`. Awaiting the result waits until it hears; its `close()` ends it. A
        plain callback runs in the event loop and must not block it.
        """
        if not isinstance(topic, str) or not topic:
            raise ValueError(f"a topic is text and not empty, not {topic!r}")
        check_text("a topic", topic)
        if not callable(callback):
            raise TypeError(f"a callback can be called, and {callback!r} cannot")
        return self._listening.add(topic, callback)

    async def unsubscribe(self, topic: str, callback: Callable[[Any], Any] | None = None) -> None:
        """End the subscriptions of a callback to a topic, or all to that topic. None is no error."""
        for listener in self._listening.find(topic, callback):
            await listener.close()

    async def _disconnect(self) -> None:
        try:
            async with self._listening.ended():
                await self._stop_asking()
                self._outboxes.clear()
                await self._pool.close()
                await self._keeper.close()
        except BaseException:  # it is cut short: what was not asked to close yet is, and is cut as well
            await together(self._pool.close, self._keeper.close)
            raise

    # -- what begins while `close` is under way would begin on what it is about to close

    async def _until_closed(self) -> None:
        while self._closing is not None:
            await asyncio.wait({self._closing})

    async def _get_broker(self, name: str | None = None) -> Broker:
        await self._until_closed()
        return await super()._get_broker(name)

    async def _reach(self, work: Callable[[Broker], Awaitable[T]], timeout: float | None, name: str | None) -> T:
        await self._until_closed()
        return await super()._reach(work, timeout, name)

    async def _get_ledger(self) -> Ledger:
        await self._until_closed()
        return await super()._get_ledger()

    async def _call_task(
        self,
        name: str,
        data: Any,
        arguments: bool,
        options: dict[str, Any],
        timeout: float | None,
        broker: str | None,
    ) -> Reply:
        await self._until_closed()
        return await super()._call_task(name, data, arguments, options, timeout, broker)
