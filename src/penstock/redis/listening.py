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
from penstock.errors import BrokerError, BrokerUnavailable
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
        self._line: Line | None = None
        self._asked: dict[bytes, deque[asyncio.Future[None]]] = {}
        self._keeping: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._live: set[bytes] = set()
        """Channels that are subscribed on the line, or about to be."""
        self._pong = True

    @property
    def up(self) -> bool:
        return self._line is not None and self._line.up

    async def subscribe(self, channels: Iterable[str], listener: Listener) -> None:
        """When it returns, what is said on these channels is heard.

        :raises BrokerError: not now, or not with these rights.
        """
        wanted = [channel.encode() for channel in channels]
        for channel in wanted:
            self._listeners.setdefault(channel, set()).add(listener)
        if wanted:
            await self._ensure(wanted)

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
        """Idempotent; it may be used again."""
        self._listeners.clear()
        keeping, self._keeping = self._keeping, None
        if keeping is not None:
            keeping.cancel()
            await asyncio.wait((keeping,))
        line, self._line = self._line, None
        if line is not None:
            line.close()
        self._forget(BrokerUnavailable("the connection is closed"))

    # -- the line

    async def _ensure(self, channels: Iterable[bytes]) -> None:
        async with self._connecting:
            line = self._line
            if line is None or not line.up:
                line = await self._connect()
            answers = []
            missing = [channel for channel in channels if channel in self._listeners and channel not in self._live]
            for channel in missing:
                answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._asked.setdefault(channel, deque()).append(answer)
                answers.append(answer)
            # Others may have asked for some of them, and not have been answered.
            answers += [
                asked[-1] for channel in channels if channel not in missing and (asked := self._asked.get(channel))
            ]
            self._live.update(missing)
            if missing:
                line.say("SUBSCRIBE", *missing)
        if answers:
            await asyncio.gather(*(asyncio.shield(answer) for answer in answers))

    async def _connect(self) -> Line:
        line = await connect(self._link.address)
        try:
            await greet(line, self._link.address)
        except BaseException:
            line.close()
            raise
        line.heard = self._hear
        self._line = line
        self._live.clear()
        self._pong = True
        line.ended.add_done_callback(lambda ended: self._ended(line, ended.result()))
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep(), name="penstock-redis-listening")
        return line

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
            self._tell_missed(back=False)

    def _forget(self, error: BrokerError) -> None:
        """What was subscribed on a line that is gone."""
        self._live.clear()
        asked, self._asked = self._asked, {}
        for answers in asked.values():
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
                    answer.exception()  # whoever was cancelled does not fetch it

    def _tell_missed(self, *, back: bool) -> None:
        for listener in {one for listeners in self._listeners.values() for one in listeners}:
            listener.missed(back)

    async def _keep(self) -> None:
        """Reconnect while somebody listens, and notice when the server is silent."""
        pause = self._link.address.timeout
        failures = 0
        complaint = ""
        while True:
            line = self._line
            if line is not None and line.up:
                await asyncio.wait((line.ended,), timeout=pause)
                if line.up and self._listeners:
                    if not self._pong:
                        line.abort(f"has not answered for {pause:g} s")
                    else:
                        self._pong = False
                        line.say("PING")
                continue
            if not self._listeners:
                self._keeping = None
                return
            try:
                await self._ensure(tuple(self._listeners))
            except BrokerError as error:
                failures += 1
                if str(error) != complaint:
                    log.warning("cannot listen: %s", error)
                complaint = str(error)
                await asyncio.sleep(backoff_delay(failures, (0.1, 5.0), random.Random()))  # noqa: S311 - no secret
            else:
                failures, complaint = 0, ""
                self._tell_missed(back=True)
