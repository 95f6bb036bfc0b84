"""The blocking twin of `Client`, made from it: each verb runs in an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from penstock.client.client import MAX_BODY, Client, resolve_broker
from penstock.client.handles import SyncHandle
from penstock.client.parallel import SyncParallel
from penstock.errors import BrokerUnavailable

P = ParamSpec("P")
R = TypeVar("R")


def _blocking(
    verb: Callable[Concatenate[Client, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[SyncClient, P], R]:
    """The verb of `Client` as a method that waits for its result."""

    def call(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(lambda client: verb(client, *args, **kwargs))

    functools.update_wrapper(call, verb)
    return call


class SyncClient:
    """`Client` for threads and scripts: the same verbs, blocking. Safe to share between threads.

    :raises ConfigError: a URL that no adapter serves.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        brokers: Mapping[str, str] | None = None,
        store: str | None = None,
        max_body: int = MAX_BODY,
        make: Callable[[], Client] | None = None,
    ) -> None:
        if make is None:
            resolved = resolve_broker(url)
            Client(resolved, brokers=brokers, store=store)  # a bad URL is told here, not at the first verb
            make = functools.partial(Client, resolved, brokers=brokers, store=store, max_body=max_body)
        self._make = make
        self._starting = threading.Lock()
        self._line: _Line | None = None
        self._inherited: _Line | None = None
        _clients.add(self)

    publish = _blocking(Client.publish)
    publish_many = _blocking(Client.publish_many)
    broadcast = _blocking(Client.broadcast)
    call = _blocking(Client.call)
    waitfor = _blocking(Client.waitfor)
    connect = _blocking(Client.connect)
    unsubscribe = _blocking(Client.unsubscribe)
    _send = _blocking(Client.send)

    def send(self, topic: str, content: Any = None, **options: Any) -> SyncHandle:
        """As `Client.send`."""
        return SyncHandle(self._send(topic, content, **options), self._run)

    def parallel(self) -> SyncParallel:
        """`with client.parallel() as calls:` makes calls at the same time, at the end of the block."""

        async def carry_out(client: Client, asked: list[tuple[Any, Any, dict[str, Any]]]) -> list[Any]:
            async with client.parallel() as calls:
                for name, data, options in asked:
                    calls.call(name, data, **options)
            return calls.results

        return SyncParallel(lambda asked: self._run(lambda client: carry_out(client, asked)))

    def subscribe(self, topic: str, callback: Callable[[Any], Any]) -> None:
        """`Client.subscribe`, live when it returns. The callback runs in the client's own thread, until
        `unsubscribe` or `close`."""

        async def subscribe(client: Client) -> None:
            await client.subscribe(topic, callback)

        self._run(subscribe)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect and end the thread. Idempotent; the next verb starts again.

        A verb under way in another thread raises `BrokerUnavailable`, unless it ends by itself first.

        :raises RuntimeError: in a callback of its own, in the very thread that it would wait for.
        """
        with self._starting:
            if self._line is not None and self._line.is_here():
                raise RuntimeError("a blocking verb would stop the event loop: await the async one instead")
            line, self._line = self._line, None
        if line is not None:
            line.close()

    def _run(self, verb: Callable[[Client], Coroutine[Any, Any, R]]) -> R:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise RuntimeError("a blocking verb would stop the event loop: await the async one instead")
        with self._starting:  # so that nothing is begun on a line that is being closed
            if self._line is None:
                self._line = _Line(self._make)
            result = self._line.begin(verb)
        try:
            return result.result()
        except concurrent.futures.CancelledError:
            raise BrokerUnavailable("the client was closed meanwhile; whether it was done is not known") from None

    def _forked(self) -> None:
        """In the child of a fork: begin anew. What was inherited has no thread, and its loop shares its
        selector with the parent's: it must not even be closed."""
        self._starting = threading.Lock()
        self._inherited, self._line = self._line, None


class _Line:
    """An event loop in a thread of its own, and the client that lives in it."""

    def __init__(self, make: Callable[[], Client]) -> None:
        self._make = make
        self._client: Client | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="penstock-sync", daemon=True)
        self._thread.start()

    def begin(self, verb: Callable[[Client], Coroutine[Any, Any, R]]) -> concurrent.futures.Future[R]:
        async def run() -> R:
            if self._client is None:
                self._client = self._make()
            return await verb(self._client)

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def is_here(self) -> bool:
        """Whether this is its thread."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        if self._client is not None:
            await self._client.close()  # what the broker has taken on ends well
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        if self._client is not None:
            await self._client.close()  # what was trying again may have connected meanwhile


_clients: weakref.WeakSet[SyncClient] = weakref.WeakSet()


def _forked() -> None:
    for client in _clients:
        client._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
