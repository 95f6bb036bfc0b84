"""Following entries of a file: what this process changes is heard of key by key, what others do by a wake-up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable

from penstock.sqlite.file import SqliteFile
from penstock.sqlite.presence import Presence
from penstock.sqlite.schema import WATCHES
from penstock.sqlite.wake import bucket, named_buckets
from penstock.stores.keys import check_keys
from penstock.stores.sqlite.operations import data_version
from penstock.waiting import Bell

LOOK = 1.0  # seconds between looks, for a wake-up that got lost


class SqliteWatch:
    """A follower in this process, and a presence in the file for the others."""

    def __init__(self, file: SqliteFile, prefix: str, among: set[SqliteWatch]) -> None:
        self._file = file
        self._prefix = prefix
        self._among = among
        self._lock = threading.Lock()  # the file's threads tell us
        self._keys: set[str] = set()
        self._buckets: dict[int, set[str]] = {}  # the same keys, by what a datagram calls them
        self._told: set[str] = set()
        self._presence = Presence(file, WATCHES, data_version, self._joined)
        self._seen: int | None = None  # the file's data version up to which nothing was missed
        self._next_look = 0.0
        self._bell: Bell | None = None
        self._closed = False

    async def follow(self, keys: Iterable[str]) -> None:
        full = [self._prefix + key for key in keys]
        check_keys(full)
        if self._closed:
            return
        with self._lock:
            self._keys.update(full)
            for key in full:
                self._buckets.setdefault(bucket(key), set()).add(key)
        self._file.followers.add(self)
        await self._presence.join()

    def unfollow(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in [self._prefix + key for key in keys]:
                if key not in self._keys:
                    continue
                self._keys.discard(key)
                self._told.discard(key)
                alike = self._buckets[bucket(key)]
                alike.discard(key)
                if not alike:
                    del self._buckets[bucket(key)]

    async def receive(self, wait: float) -> set[str]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        while not self._closed:
            if self._seen is not None and loop.time() >= self._next_look:
                await self._look()
            told = self._take_told()
            left = until - loop.time()
            if told or left <= 0:
                return told
            await self._bell.wait(min(left, LOOK))
        return set()

    async def close(self) -> None:
        self._closed = True
        self._among.discard(self)
        self._file.followers.discard(self)
        if self._bell is not None:
            self._bell.ring()
        await self._presence.leave()

    def hear(self, keys: set[str]) -> None:
        with self._lock:
            self._tell(keys & self._keys)

    def hear_from_afar(self, ids: set[int] | None) -> None:
        named = named_buckets(ids or set())
        with self._lock:
            if not named:
                self._tell(self._keys)
            for one in named:
                self._tell(self._buckets.get(one, set()))

    def _tell(self, keys: set[str]) -> None:
        """Under the lock. What was told before and not yet taken has rung already."""
        ring = bool(keys) and not self._told and self._bell is not None
        self._told |= keys
        if ring and self._bell is not None:
            self._bell.ring_from_thread()

    def _take_told(self) -> set[str]:
        with self._lock:
            told, self._told = self._told, set()
        return {key[len(self._prefix) :] for key in told}

    def _joined(self, seen: int) -> None:
        if self._seen is not None:
            self._tell_all()  # for a while others did not know of us
        self._seen = seen
        self._next_look = asyncio.get_running_loop().time() + LOOK

    async def _look(self) -> None:
        """Whether another process has changed the file: then any wake-up may have got lost."""
        seen = await self._file.submit(data_version, data_version)
        self._next_look = asyncio.get_running_loop().time() + LOOK
        if seen != self._seen:
            self._seen = seen
            self._tell_all()

    def _tell_all(self) -> None:
        with self._lock:
            self._tell(self._keys)
