"""Listening to broadcasts: callbacks by topic, on one inbox that is made again when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any

from penstock import codec
from penstock.brokers.base import INBOX_SIZE, Broker, Inbox
from penstock.clock import backoff_delay
from penstock.errors import BrokerError, BrokerUnavailable, InvalidMessage, one_line
from penstock.message import Delivery

log = logging.getLogger("penstock.listening")

Callback = Callable[[Any], Any]

RECEIVE_WAIT = 30.0  # seconds; only a bound
BACKOFF = (0.1, 5.0)  # seconds between tries to get an inbox


class Listener:
    """One callback on one topic, as `subscribe` returns it.

    Awaiting it waits until it hears. `close()` ends it. Calls of its callback do not overlap; data that
    it is too slow for is dropped, the oldest first, once ten thousand wait.
    """

    def __init__(self, listening: Listening, topic: str, callback: Callback, decode: codec.Decode) -> None:
        self.topic = topic
        self.callback = callback
        self.decode = decode
        self._listening = listening
        self._live: asyncio.Event | None = None
        self._failure: BrokerError | None = None
        self._waiting: deque[Any] = deque(maxlen=INBOX_SIZE)
        self._calling: asyncio.Task[None] | None = None
        self._is_live = False

    def __await__(self) -> Generator[Any, Any, Listener]:
        return self._wait().__await__()

    async def close(self) -> None:
        """Hear nothing more. Idempotent."""
        await self._listening.remove(self)

    async def _wait(self) -> Listener:
        """:raises BrokerRefused: it never will be."""
        self._listening.start()
        if self._live is None:
            self._live = asyncio.Event()
        while not self._is_live and self._failure is None:
            await self._live.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def became(self, live: bool, failure: BrokerError | None = None) -> None:
        self._is_live, self._failure = live, failure
        if self._live is not None:
            self._live.set() if live or failure else self._live.clear()

    def hear(self, data: Any) -> None:
        self._waiting.append(data)
        if self._calling is None or self._calling.done():
            self._calling = asyncio.create_task(self._call(), name=f"penstock-listener {self.topic}")

    def stop(self) -> None:
        self._waiting.clear()
        if self._calling is not None and self._calling is not asyncio.current_task():
            self._calling.cancel()

    async def _call(self) -> None:
        while self._waiting:
            data = self._waiting.popleft()
            try:
                result = self.callback(data)
                if inspect.isawaitable(result):
                    await result
            except Exception:
                log.exception("a listener to %r failed", self.topic)


class Listening:
    """All listeners of a client. Listeners may be added before there is an event loop; `start` brings them to life."""

    def __init__(self, get_broker: Callable[[], Awaitable[Broker]], max_body: int) -> None:
        self._get_broker = get_broker
        self._max_body = max_body
        self._listeners: list[Listener] = []
        self._inbox: Inbox | None = None
        self._pumping: asyncio.Task[None] | None = None
        self._applying: set[asyncio.Task[None]] = set()
        self._ended = False
        self._is_wanted = False
        """Somebody wants to listen, once nothing is `ended` any more."""

    def add(self, topic: str, callback: Callback, decode: codec.Decode = codec.decode) -> Listener:
        listener = Listener(self, topic, callback, decode)
        self._listeners.append(listener)
        self.start()
        return listener

    def find(self, topic: str, callback: Callback | None) -> list[Listener]:
        return [one for one in self._listeners if one.topic == topic and callback in (None, one.callback)]

    async def remove(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)
            listener.stop()
            if self._inbox is not None:
                with contextlib.suppress(BrokerUnavailable):
                    await self._apply(self._inbox)

    def start(self) -> None:
        """Listen, if there is an event loop to do it in and anything to listen to. Idempotent."""
        if not self._listeners:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if self._ended:
            self._is_wanted = True
        elif self._pumping is None or self._pumping.done() or self._pumping.get_loop() is not loop:
            self._pumping = asyncio.create_task(self._pump(), name="penstock-listening")
        elif self._inbox is not None and self._some_wait() and all(task.done() for task in self._applying):
            applying = asyncio.create_task(self._apply_soon(self._inbox), name="penstock-listening anew")
            self._applying.add(applying)
            applying.add_done_callback(self._applying.discard)

    @contextlib.asynccontextmanager
    async def ended(self) -> AsyncIterator[None]:
        """Hear nothing until `start` again, which takes effect at the end of this block at the earliest."""
        self._ended = True
        try:
            await self._stop()
            yield
        finally:
            self._ended = False
            if self._is_wanted:
                self._is_wanted = False
                self.start()

    async def _stop(self) -> None:
        loop = asyncio.get_running_loop()
        for task in (self._pumping, *self._applying):
            if task is not None and task.get_loop() is loop:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._pumping = None
        self._applying.clear()
        self._tell(live=False)
        for listener in self._listeners:
            listener.stop()

    async def _pump(self) -> None:
        failures = 0
        while True:
            try:
                inbox = self._inbox = (await self._get_broker()).inbox()
                life = inbox.life
                await self._apply(inbox)
                while inbox.life == life:
                    heard = await inbox.receive(RECEIVE_WAIT)
                    failures = 0
                    for delivery in heard:
                        self._dispatch(delivery)
                raise BrokerUnavailable("the connection was lost")
            except BrokerUnavailable as error:
                failures += 1
                delay = backoff_delay(failures, BACKOFF, random.Random())  # noqa: S311 - jitter
                log.warning("cannot listen, again in %.1f s: %s", delay, one_line(error))
                self._tell(live=False)
                await self._close_inbox()
                await asyncio.sleep(delay)
            except BrokerError as error:
                log.error("cannot listen: %s", error)
                self._tell(live=False, failure=error)
                return
            finally:
                await self._close_inbox()

    async def _apply(self, inbox: Inbox) -> None:
        """Have the inbox listen to what the listeners want."""
        wanted = list(self._listeners)
        await inbox.listen(frozenset(listener.topic for listener in wanted))
        if inbox is self._inbox:
            for listener in wanted:
                listener.became(live=True)

    async def _apply_soon(self, inbox: Inbox) -> None:
        with contextlib.suppress(BrokerUnavailable):  # the pump notices too, and applies them to the next inbox
            while inbox is self._inbox and self._some_wait():
                await self._apply(inbox)

    def _some_wait(self) -> bool:
        """Whether there are listeners that do not hear yet."""
        return any(not one._is_live for one in self._listeners)

    def _dispatch(self, delivery: Delivery) -> None:
        for listener in self._listeners:
            if listener.topic != delivery.topic:
                continue
            try:
                data = listener.decode(delivery.raw, delivery.headers, self._max_body)
            except InvalidMessage as error:
                log.warning("a broadcast to %r is invalid: %s", delivery.topic, error)
            else:
                listener.hear(data)

    def _tell(self, live: bool, failure: BrokerError | None = None) -> None:
        for listener in self._listeners:
            listener.became(live, failure)

    async def _close_inbox(self) -> None:
        inbox, self._inbox = self._inbox, None
        if inbox is not None:
            with contextlib.suppress(BrokerError):
                await inbox.close()
