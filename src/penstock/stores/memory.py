"""`memory://`: a store in this process, for tests, simulations and single-process tools.

`memory://name` is shared by all that name it in this process; `memory://` alone is nobody else's.
Nothing survives the process.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence

from penstock.clock import SYSTEM_CLOCK, Clock
from penstock.config import parse_url
from penstock.stores.base import ABSENT, Change, Entry, Put, StoreCapabilities, Touch
from penstock.stores.keys import check_keys, key_range
from penstock.waiting import Bell

_servers: dict[tuple[str, str], MemoryStoreServer] = {}


class SortedKeys:
    """Distinct texts in order, in lists so short that an insertion moves little."""

    MOST = 2000

    def __init__(self) -> None:
        self._lists: list[list[str]] = [[]]
        self._firsts = [""]  # not above what is in the list; of the first one it is below everything

    def add(self, key: str) -> None:
        at = bisect_right(self._firsts, key) - 1
        keys = self._lists[at]
        insort(keys, key)
        if len(keys) > self.MOST:
            half = len(keys) // 2
            self._lists.insert(at + 1, keys[half:])
            self._firsts.insert(at + 1, keys[half])
            del keys[half:]

    def remove(self, key: str) -> None:
        at = bisect_right(self._firsts, key) - 1
        keys = self._lists[at]
        del keys[bisect_left(keys, key)]
        if not keys and at > 0:
            del self._lists[at], self._firsts[at]

    def upwards(self, low: str) -> Iterator[str]:
        """From `low` on."""
        at = bisect_right(self._firsts, low) - 1
        keys = self._lists[at]
        yield from keys[bisect_left(keys, low) :]
        for keys in self._lists[at + 1 :]:
            yield from keys

    def downwards(self, high: str | None) -> Iterator[str]:
        """From below `high`, or from the end."""
        at = len(self._lists) - 1 if high is None else bisect_right(self._firsts, high) - 1
        keys = self._lists[at]
        yield from reversed(keys if high is None else keys[: bisect_left(keys, high)])
        for keys in reversed(self._lists[:at]):
            yield from reversed(keys)


class MemoryStoreServer:
    """The state that stores of one name share. Thread-safe: an app and its blocking twin may meet here."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._keys = SortedKeys()
        self._expiring: list[tuple[float, str]] = []  # heap; an item may be outdated
        self._version = 0  # one count for all keys: what was deleted need not be remembered
        self._followers: dict[str, set[MemoryWatch]] = {}

    def __len__(self) -> int:
        """How many entries take up memory."""
        return len(self._entries)

    def get(self, keys: Sequence[str]) -> list[Entry | None]:
        with self._lock:
            self._sweep(self.clock.time())
            return [self._entries.get(key) for key in keys]

    def apply(self, changes: Sequence[Change]) -> list[int | None]:
        with self._lock:
            now = self.clock.time()
            self._sweep(now)
            return [self._apply(change, now) for change in changes]

    def scan(self, prefix: str, after: str | None, limit: int, newest_first: bool) -> list[Entry]:
        low, high = key_range(prefix, after, newest_first)
        found: list[Entry] = []
        with self._lock:
            self._sweep(self.clock.time())
            for key in self._keys.downwards(high) if newest_first else self._keys.upwards(low):
                if len(found) >= limit or not key.startswith(prefix):
                    break
                found.append(self._entries[key])
        return found

    def follow(self, watch: MemoryWatch, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._followers.setdefault(key, set()).add(watch)
                watch.keys.add(key)

    def unfollow(self, watch: MemoryWatch, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                watch.keys.discard(key)
                watch.told.discard(key)
                followers = self._followers.get(key, set())
                followers.discard(watch)
                if not followers:
                    self._followers.pop(key, None)

    def take_told(self, watch: MemoryWatch) -> set[str]:
        with self._lock:
            told, watch.told = watch.told, set()
            return told

    def _apply(self, change: Change, now: float) -> int | None:
        entry = self._entries.get(change.key)
        if entry is not None and entry.expires_at is not None and entry.expires_at <= now:
            self._remove(entry.key)  # it was given no time to live a moment ago
            entry = None
        version = ABSENT if entry is None else entry.version
        if isinstance(change, Touch):
            if entry is None:
                return None
            self._store(entry.key, entry.value, version, change.ttl, now)
            return version
        if change.expect is not None and change.expect != version:
            return None
        if isinstance(change, Put):
            self._version += 1
            version = self._version
            self._store(change.key, bytes(change.value), version, change.ttl, now)  # the caller's may be mutable
        elif entry is None:
            return ABSENT
        else:
            self._remove(entry.key)
            version = ABSENT
        if change.tell:
            self._tell(change.key)
        return version

    def _tell(self, key: str) -> None:
        for watch in self._followers.get(key, ()):
            watch.told.add(key)
            watch.ring()

    def _store(self, key: str, value: bytes, version: int, ttl: float | None, now: float) -> None:
        if key not in self._entries:
            self._keys.add(key)
        expires_at = None if ttl is None else now + ttl
        self._entries[key] = Entry(key, value, version, expires_at)
        if expires_at is not None:
            heapq.heappush(self._expiring, (expires_at, key))

    def _remove(self, key: str) -> None:
        del self._entries[key]
        self._keys.remove(key)

    def _sweep(self, now: float) -> None:
        """Remove what has expired."""
        while self._expiring and self._expiring[0][0] <= now:
            _, key = heapq.heappop(self._expiring)
            entry = self._entries.get(key)
            if entry is not None and entry.expires_at is not None and entry.expires_at <= now:
                self._remove(key)
        if len(self._expiring) > 2 * len(self._entries) + 100:  # mostly outdated: put again, touched, deleted
            self._expiring = [
                (entry.expires_at, entry.key) for entry in self._entries.values() if entry.expires_at is not None
            ]
            heapq.heapify(self._expiring)


class MemoryStore:
    """One user of a `MemoryStoreServer`: that of its name, of its own, or the given one."""

    capabilities = StoreCapabilities(durable=False, shared=False)

    def __init__(self, url: str = "memory://", *, server: MemoryStoreServer | None = None) -> None:
        parts = parse_url(url)
        options = parts.options({"vhost": str}, "memory")
        name = (parts.host or "") + parts.path
        if server is None:
            address = (name, options.get("vhost", "").strip("/"))
            server = _servers.setdefault(address, MemoryStoreServer()) if name else MemoryStoreServer()
        self.server = server
        self._watches: set[MemoryWatch] = set()

    async def open(self) -> None:
        pass  # there is nothing to connect to

    async def close(self) -> None:
        for watch in tuple(self._watches):
            await watch.close()

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        check_keys(keys)
        return self.server.get(keys)

    async def apply(self, changes: Sequence[Change]) -> list[int | None]:
        check_keys([change.key for change in changes])
        return self.server.apply(changes)

    async def scan(
        self, prefix: str, *, after: str | None = None, limit: int = 100, newest_first: bool = False
    ) -> list[Entry]:
        return self.server.scan(prefix, after, limit, newest_first)

    def watch(self) -> MemoryWatch:
        watch = MemoryWatch(self.server, self._watches)
        self._watches.add(watch)
        return watch


class MemoryWatch:
    """A follower of keys of its server."""

    def __init__(self, server: MemoryStoreServer, among: set[MemoryWatch]) -> None:
        self.keys: set[str] = set()
        self.told: set[str] = set()
        self._server = server
        self._among = among
        self._bell: Bell | None = None
        self._closed = False

    def ring(self) -> None:
        if self._bell is not None:
            self._bell.ring_from_thread()

    async def follow(self, keys: Iterable[str]) -> None:
        if not self._closed:
            self._server.follow(self, keys)

    def unfollow(self, keys: Iterable[str]) -> None:
        self._server.unfollow(self, keys)

    async def receive(self, wait: float) -> set[str]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        while not self._closed:
            told = self._server.take_told(self)
            left = until - loop.time()
            if told or left <= 0:
                return told
            await self._bell.wait(left)
        return set()

    async def close(self) -> None:
        self._closed = True
        self._among.discard(self)
        self._server.unfollow(self, tuple(self.keys))
        self.ring()
