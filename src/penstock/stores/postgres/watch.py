"""Following entries: each change that tells is a notification with the keys, sent as it is committed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgspec

from penstock.postgres.listener import Listener
from penstock.stores.keys import check_keys
from penstock.waiting import Bell

_decode = msgspec.json.Decoder(set[str]).decode


class PostgresWatch:
    """See `Watch`. All watches of a store hear on one connection."""

    def __init__(self, listener: Listener, schema: str, hear: Callable[[str], None], among: set[PostgresWatch]) -> None:
        self._listener = listener
        self._channel = f"penstock-keys:{schema}"
        self._hear = hear
        self._among = among
        self._keys: set[str] = set()
        self._told: set[str] = set()
        self._bell: Bell | None = None
        self._closed = False

    async def follow(self, keys: Iterable[str]) -> None:
        wanted = list(keys)
        check_keys(wanted)
        if self._closed:
            return
        self._keys.update(wanted)
        await self._listener.listen(self._channel, self._hear)

    def unfollow(self, keys: Iterable[str]) -> None:
        gone = set(keys)
        self._keys -= gone
        self._told -= gone

    async def receive(self, wait: float) -> set[str]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        while not self._closed:
            told, self._told = self._told, set()
            left = until - loop.time()
            if told or left <= 0:
                return told
            await self._bell.wait(left)
        return set()

    async def close(self) -> None:
        self._closed = True
        self._among.discard(self)
        if self._bell is not None:
            self._bell.ring()

    def hear(self, payload: str) -> None:
        """A list of keys; an empty text: any."""
        try:
            named = self._keys & _decode(payload) if payload else self._keys
        except msgspec.DecodeError:  # anybody may notify
            return
        if named and not self._told and self._bell is not None:
            self._bell.ring()
        self._told |= named
