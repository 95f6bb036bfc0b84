"""Following keys, each by a channel of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from penstock.errors import BrokerUnavailable
from penstock.redis.listening import Listening
from penstock.waiting import Bell


class RedisWatch:
    """Listens while it follows something."""

    def __init__(self, listening: Listening, channels: str, among: set[RedisWatch]) -> None:
        self._listening = listening
        self._channels = channels
        self._skip = len(channels.encode())
        self._among = among
        self._keys: set[str] = set()
        self._told: set[str] = set()
        self._gap = False
        """Whether changes may have gone unheard."""
        self._bell: Bell | None = None
        self._closed = False

    async def follow(self, keys: Iterable[str]) -> None:
        fresh = set(keys) - self._keys
        if self._closed or not fresh:
            return
        self._keys |= fresh
        try:
            await self._listening.subscribe(map(self._channel, fresh), self)
        except BaseException:
            self.unfollow(fresh)
            raise
        if self._closed:
            self.unfollow(fresh)

    def unfollow(self, keys: Iterable[str]) -> None:
        gone = set(keys) & self._keys
        self._keys -= gone
        self._told -= gone
        self._listening.unsubscribe(map(self._channel, gone), self)

    async def receive(self, wait: float) -> set[str]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        while not self._closed:
            if self._gap:
                self._gap = False
                raise BrokerUnavailable("the connection was lost: changes may have gone unheard")
            told, self._told = self._told, set()
            left = until - loop.time()
            if told or left <= 0:
                return told
            await self._bell.wait(left)
        return set()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._among.discard(self)
        self.unfollow(tuple(self._keys))
        self._ring()

    # -- called by `Listening`

    def heard(self, channel: bytes, data: bytes) -> None:
        key = channel[self._skip :].decode()
        if key in self._keys:
            self._told.add(key)
            self._ring()

    def missed(self, back: bool) -> None:
        self._gap = True
        self._ring()

    def _channel(self, key: str) -> str:
        return self._channels + key

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()
