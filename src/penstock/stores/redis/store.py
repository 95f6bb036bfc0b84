"""The contract of a store on a Redis server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from penstock.redis.address import parse_address
from penstock.redis.checks import Keeping, survey
from penstock.redis.line import Word
from penstock.redis.link import Link
from penstock.redis.listening import Listening
from penstock.stores.base import Change, Delete, Entry, StoreCapabilities, Touch
from penstock.stores.keys import check_keys, key_range
from penstock.stores.redis import lua
from penstock.stores.redis.watch import RedisWatch
from penstock.waiting import Gathering

ROOM = "penstock-store"
MAX_BYTES = 16 * 2**20  # of values in one script, so that others are served in between
MAX_KEYS = 1000  # in one question
MAX_CHANGES = 10_000  # in one script
_WORDS = 6  # of a change
_VALUE = 2  # its place among the words of a change


class RedisStore:
    """`redis://user:password@host:port/database`, optionally `?vhost=namespace`."""

    capabilities = StoreCapabilities(durable=False, shared=True)  # until the server has said that it is

    def __init__(self, url: str) -> None:
        self.address = parse_address(url)
        self.prefix = self.address.prefix(ROOM)
        self.channels = self.address.channels(ROOM)
        self._link = Link(self.address)
        self._listening = Listening(self._link)
        self._keeping = Keeping()
        self._watches: set[RedisWatch] = set()
        self._changes: Gathering[list[tuple[Word, ...]], list[int | None]] = Gathering(self._apply_all)

    async def open(self) -> None:
        self._keeping = await survey(self._link)
        self.capabilities = StoreCapabilities(durable=self._keeping.durable, shared=True)

    async def close(self) -> None:
        await asyncio.gather(*(watch.close() for watch in tuple(self._watches)))
        self._link.close()
        try:
            await self._listening.close()
        finally:
            self._link.close()  # it may have connected again meanwhile

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        check_keys(keys)
        entries: list[Entry | None] = []
        for at in range(0, len(keys), MAX_KEYS):
            some = keys[at : at + MAX_KEYS]
            seconds, micros, found = await self._link.run(lua.GET, self.prefix, *some)
            now = int(seconds) + int(micros) / 1e6
            for key, packed in zip(some, found, strict=True):
                entry = None if packed is None else unpack(key, packed)
                expired = entry is not None and entry.expires_at is not None and entry.expires_at <= now
                entries.append(None if expired else entry)
        return entries

    async def apply(self, changes: Sequence[Change]) -> list[int | None]:
        check_keys([change.key for change in changes])
        return await self._changes.do([_words(change) for change in changes]) if changes else []

    async def scan(
        self, prefix: str, *, after: str | None = None, limit: int = 100, newest_first: bool = False
    ) -> list[Entry]:
        low, high = key_range(prefix, after, newest_first)
        if high is not None and high <= low:
            return []
        upto = "+" if high is None else f"({high}"
        found = await self._link.run(lua.SCAN, self.prefix, f"[{low}", upto, limit, int(newest_first))
        return [unpack(key.decode(), packed) for key, packed in zip(found[::2], found[1::2], strict=True)]

    def watch(self) -> RedisWatch:
        self._keeping.warn(self.address.name)
        watch = RedisWatch(self._listening, self.channels, self._watches)
        self._watches.add(watch)
        return watch

    async def _apply_all(self, asked: Sequence[list[tuple[Word, ...]]]) -> list[list[int | None]]:
        """What many asked for at once, in as few scripts as there are megabytes."""
        outcomes: list[int | None] = []
        words: list[Word] = []
        size = 0
        for change in [change for changes in asked for change in changes]:
            if size > MAX_BYTES or len(words) >= MAX_CHANGES * _WORDS:
                outcomes += await self._run(words)
                words, size = [], 0
            words += change
            size += len(change[_VALUE])  # type: ignore[arg-type]
        outcomes += await self._run(words)
        found = iter(outcomes)
        return [[next(found) for _ in changes] for changes in asked]

    async def _run(self, words: list[Word]) -> list[int | None]:
        told = await self._link.run(lua.APPLY, self.prefix, self.channels, *words)
        return [None if version is None else int(version) for version in told]


def unpack(key: str, packed: bytes) -> Entry:
    head, _, value = packed.partition(b"\n")
    version, _, expires = head.partition(b" ")
    return Entry(key, value, int(version), float(expires) if expires else None)


def _words(change: Change) -> tuple[Word, ...]:
    """As `lua.APPLY` takes them, six words each."""
    if isinstance(change, Touch):
        return ("t", change.key, b"", _said(change.ttl), "", "")
    expect = "" if change.expect is None else str(change.expect)
    if isinstance(change, Delete):
        return ("d", change.key, b"", "", expect, int(change.tell))
    return ("p", change.key, bytes(change.value), _said(change.ttl), expect, int(change.tell))


def _said(ttl: float | None) -> str:
    return "" if ttl is None else repr(float(ttl))
