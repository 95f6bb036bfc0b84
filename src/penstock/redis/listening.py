"""`Listening`: the channels that somebody here listens to, on a connection of their own.

One that also carried commands would count as a subscriber, whose answers the server cuts at 32 MB.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

from penstock.clock import backoff_delay
from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable
from penstock.redis.line import Line, connect
from penstock.redis.link import Link, greet

log = logging.getLogger("penstock.redis")


class Listener(Protocol):
    """Whoever listens to some channels; called in the event loop."""

    def heard(self, channel: bytes, data: bytes) -> None: ...

    def missed(self, back: bool) -> None:
        """The connection was lost, or is `back`: something may have gone unheard."""
        ...


class Listening:
    """What a link's server says on channels. Once somebody listens it reconnects by itself."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._listeners: dict[bytes, set[Listener]] = {}
        self._deaf: set[Listener] = set()
        """Those who were told that the connection is lost, and not yet that it is back."""
        self._line: Line | None = None
        self._asked: dict[bytes, deque[asyncio.Future[None]]] = {}
        self._keeping: asyncio.Task[None] | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._live: set[bytes] = set()
        """Channels that are subscribed on the line, or about to be."""
        self._pong = True
        self._closings = 0

    @property
    def up(self) -> bool:
        """Whether all that somebody listens to is heard."""
        connecting = self._connecting is not None and not self._connecting.done()
        return not connecting and self._line is not None and self._line.up

    async def subscribe(self, channels: Iterable[str], listener: Listener) -> None:
        """When it returns, what is said on these channels is heard.

        :raises BrokerError: not now, or not with these rights.
        """
        channels = tuple(channels)
        wanted = [channel.encode() for channel in channels]
        for channel in wanted:
            self._listeners.setdefault(channel, set()).add(listener)
        if not wanted:
            return
        try:
            await self._subscribe(await self._ready(), wanted)
        except BrokerRefused:
            self.unsubscribe(channels, listener)  # nobody else's listening must fail for it
            raise

    def unsubscribe(self, channels: Iterable[str], listener: Listener) -> None:
        gone = []
        for channel in [one.encode() for one in channels]:
            listeners = self._listeners.get(channel)
            if listeners is None:
                continue
            listeners.discard(listener)
            if not listeners:
                del self._listeners[channel]
                self._live.discard(channel)
                gone.append(channel)
        if gone and self._line is not None:
            self._line.say("UNSUBSCRIBE", *gone)

    async def close(self) -> None:
        """Idempotent; it may be used again, in another event loop too."""
        self._closings += 1
        self._listeners.clear()
        self._deaf.clear()
        ending = [task for task in (self._keeping, self._connecting) if task is not None]
        self._keeping = self._connecting = None
        for task in ending:
            task.cancel()
        line, self._line = self._line, None
        if line is not None:
            line.close()
        self._forget(BrokerUnavailable("the connection is closed"))
        if ending:
            await asyncio.wait(ending)

    # -- the line

    async def _ready(self) -> Line:
        """A line on which every channel is subscribed that somebody listens to.

        :raises BrokerError: there is none now.
        """
        closings = self._closings
        while self._line is None or not self.up:
            # One that has just ended has not told us yet: to wait for it would be no wait at all.
            if self._connecting is None or self._connecting.done():
                self._connecting = asyncio.create_task(self._connect(), name="penstock-redis-listening-connect")
                self._connecting.add_done_callback(self._connected)
            connecting, task = self._connecting, asyncio.current_task()
            try:
                await asyncio.shield(connecting)  # others may be waiting for it too
            except asyncio.CancelledError:
                if connecting.cancelled() and not (task and task.cancelling()):
                    raise BrokerUnavailable("the connection is closed") from None
                raise
            if self._closings != closings:
                raise BrokerUnavailable("the connection is closed")
        if self._keeping is None and self._listeners:
            self._keeping = asyncio.create_task(self._keep(), name="penstock-redis-listening")
        return self._line

    def _connected(self, connecting: asyncio.Task[None]) -> None:
        if self._connecting is connecting:
            self._connecting = None
        if not connecting.cancelled():
            connecting.exception()  # whoever was cancelled does not fetch it

    async def _connect(self) -> None:
        address = self._link.address
        try:
            line = await connect(address)
            try:
                await greet(line, address)
                line.heard = self._hear
                line.ended.add_done_callback(lambda ended: self._ended(line, ended.result()))
                self._line = line
                self._live.clear()
                self._pong = True
                await self._subscribe(line, tuple(self._listeners))
            except BaseException:
                line.close()
                raise
        except BrokerUnavailable:
            self._link.shun(address)
            raise
        deaf, self._deaf = self._deaf, set()
        for listener in deaf & self._all():
            listener.missed(True)

    async def _subscribe(self, line: Line, channels: Iterable[bytes]) -> None:
        """Return when the server has subscribed those of `channels` that somebody listens to."""
        wanted = [channel for channel in channels if channel in self._listeners]
        missing = [channel for channel in wanted if channel not in self._live]
        for channel in missing:
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._asked.setdefault(channel, deque()).append(answer)
        # Others may have asked for some of them, and not have been answered.
        answers = [asked[-1] for channel in wanted if (asked := self._asked.get(channel))]
        self._live.update(missing)
        if missing:
            line.say("SUBSCRIBE", *missing)
        patience = self._link.address.timeout
        try:
            async with asyncio.timeout(patience):
                await asyncio.gather(*(asyncio.shield(answer) for answer in answers))
        except TimeoutError:
            line.abort(f"has not answered for {patience:g} s")
            raise line.ended.result() from None

    def _hear(self, message: list[Any]) -> None:
        kind, channel = message[0], message[1]
        if kind == b"message":
            for listener in tuple(self._listeners.get(channel, ())):
                listener.heard(channel, message[2])
        elif kind == b"subscribe":
            asked = self._asked.get(channel)
            if asked:
                answer = asked.popleft()
                if not asked:
                    del self._asked[channel]
                if not answer.done():
                    answer.set_result(None)
        elif kind == b"pong":
            self._pong = True

    def _ended(self, line: Line, error: BrokerError) -> None:
        if self._line is line:
            self._forget(error)
            self._deaf |= self._all()
            for listener in self._all():
                listener.missed(False)

    def _forget(self, error: BrokerError) -> None:
        """What was subscribed on a line that is gone."""
        self._live.clear()
        asked, self._asked = self._asked, {}
        for answers in asked.values():
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
                    answer.exception()  # whoever was cancelled does not fetch it

    def _all(self) -> set[Listener]:
        return {one for listeners in self._listeners.values() for one in listeners}

    async def _keep(self) -> None:
        """Reconnect while somebody listens, and notice when the server is silent."""
        failures = 0
        complaint = ""
        while self._listeners:
            line = self._line
            if line is not None and line.up:
                failures, complaint = 0, ""
                await self._attend(line)
                continue
            try:
                await self._ready()
            except BrokerError as error:
                failures += 1
                if str(error) != complaint:
                    log.warning("cannot listen: %s", error)
                complaint = str(error)
                await asyncio.sleep(backoff_delay(failures, (0.1, 5.0), random.Random()))  # noqa: S311 - no secret
        self._keeping = None

    async def _attend(self, line: Line) -> None:
        """Until the line has ended, or was silent for too long."""
        pause = self._link.address.timeout
        await asyncio.wait((line.ended,), timeout=pause)
        if line.up and self._listeners:
            if self._pong:
                self._pong = False
                line.say("PING")
            else:
                line.abort(f"has not answered for {pause:g} s")
