"""What happens to the entries of a file, each a plain function inside one transaction.

A key in the file is `<namespace>/<key>`; `prefix` is what stands in front. Times are Unix time in microseconds.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence

import msgspec

from penstock.sqlite.file import Transaction
from penstock.sqlite.schema import NEVER
from penstock.stores.base import ABSENT, Change, Delete, Entry, Put, Touch
from penstock.stores.keys import key_range
from penstock.stores.sqlite import sql

AT_ONCE = 64  # entries read in one statement: SQLite joins their values into one, of at most 1 GB
PUT_SIZES = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # few distinct statements, so that they stay prepared
LONGEST = 1e12  # seconds; a longer time to live is for ever
SWEEP_EVERY = 1.0  # seconds
SWEEP_ENTRIES = 500
SWEEP_BYTES = 16 * 2**20

_decode_versions = msgspec.json.Decoder(list[tuple[int, int]]).decode
_decode_got = msgspec.json.Decoder(list[tuple[int, int, int, int]]).decode
_decode_scanned = msgspec.json.Decoder(list[tuple[str, int, int, int]]).decode


def _now() -> int:
    return int(time.time() * 1e6)


def _listed(values: Sequence[str]) -> str:
    return msgspec.json.encode(values).decode()


def _entry(key: str, version: int, expires: int, value: bytes) -> Entry:
    return Entry(key, value, version, None if expires == NEVER else expires / 1e6)


# -- looking


def get(tx: Transaction, prefix: str, keys: Sequence[str]) -> list[Entry | None]:
    now = _now()
    if len(keys) == 1:
        row = tx.execute(sql.GET_ONE, (prefix + keys[0], now)).fetchone()
        return [_entry(keys[0], *row) if row else None]
    found: list[Entry | None] = [None] * len(keys)
    start, most = 0, AT_ONCE
    while start < len(keys):
        part = keys[start : start + most]
        try:
            content, values = tx.execute(sql.GET, (_listed([prefix + key for key in part]), now)).fetchone()
        except sqlite3.DataError:  # larger together than SQLite can join
            if most == 1:
                raise
            most //= 2
            continue
        end = 0
        for place, version, expires, size in _decode_got(content or "[]"):
            at, end = end, end + size
            found[start + place] = _entry(part[place], version, expires, values[at:end])
        start += len(part)
    return found


def scan(tx: Transaction, prefix: str, begin: str, after: str | None, limit: int, newest_first: bool) -> list[Entry]:
    """Entries whose keys begin with `begin`, read in pages, each as it is at its moment."""
    now = _now()
    low, high = key_range(prefix + begin, None if after is None else prefix + after, newest_first)
    assert high is not None  # a prefix ends in a slash
    statement = sql.SCAN_DOWN if newest_first else sql.SCAN_UP
    found: list[Entry] = []
    most = AT_ONCE
    while len(found) < limit:
        wanted = min(limit - len(found), most)
        try:
            content, values = tx.execute(statement, (low, high, now, wanted)).fetchone()
        except sqlite3.DataError:
            if most == 1:
                raise
            most //= 2
            continue
        rows = _decode_scanned(content or "[]")
        end = 0
        for key, version, expires, size in rows:
            at, end = end, end + size
            found.append(_entry(key[len(prefix) :], version, expires, values[at:end]))
        if len(rows) < wanted:
            break
        last = rows[-1][0]
        low, high = (low, last) if newest_first else (last + "\0", high)
    return found


# -- changing


def apply(tx: Transaction, prefix: str, changes: Sequence[Change]) -> list[int | None]:
    """Decide on all changes with one look at the versions, then write what comes of them, a statement for each kind."""
    batch = Batch(tx, prefix, changes)
    outcomes: list[int | None] = []
    for change in changes:
        if isinstance(change, Touch):
            outcomes.append(batch.touch(change))
        elif change.expect is not None and change.expect != batch.versions.get(change.key, ABSENT):
            outcomes.append(None)
        elif isinstance(change, Put):
            outcomes.append(batch.put(change))
        else:
            outcomes.append(batch.delete(change))
    batch.write(tx)
    return outcomes


class Batch:
    """What some changes, one after the other, make of the entries they are about."""

    __slots__ = ("_last", "_now", "_prefix", "deleted", "stored", "told", "touched", "versions")

    def __init__(self, tx: Transaction, prefix: str, changes: Sequence[Change]) -> None:
        self._now = _now()
        self._prefix = prefix
        asked = {change.key for change in changes if isinstance(change, Touch) or change.expect is not None}
        self.versions = _versions(tx, prefix, list(asked), self._now) if asked else {}
        """Of each key that a change depends on and that exists, as of the change that comes next."""
        puts = sum(isinstance(change, Put) for change in changes)
        self._last = tx.execute(sql.RESERVE_VERSIONS, (puts,)).fetchone()[0] - puts if puts else 0
        self.stored: dict[str, tuple[int, int, bytes]] = {}
        self.touched: dict[str, int] = {}
        self.deleted: set[str] = set()
        self.told: set[str] = set()

    def put(self, change: Put) -> int:
        self._last += 1
        expires = self._expiry(change.ttl)
        self.stored[change.key] = (self._last, expires, change.value)
        self.versions[change.key] = self._last if expires > self._now else ABSENT
        if change.tell:
            self.told.add(change.key)
        return self._last

    def delete(self, change: Delete) -> int:
        self.deleted.add(change.key)
        self.stored.pop(change.key, None)
        self.versions[change.key] = ABSENT
        if change.tell:
            self.told.add(change.key)
        return ABSENT

    def touch(self, change: Touch) -> int | None:
        version = self.versions.get(change.key, ABSENT)
        if version == ABSENT:
            return None
        expires = self._expiry(change.ttl)
        stored = self.stored.get(change.key)
        if stored is None:
            self.touched[change.key] = expires
        else:
            self.stored[change.key] = (version, expires, stored[2])
        if expires <= self._now:
            self.versions[change.key] = ABSENT
        return version

    def write(self, tx: Transaction) -> None:
        prefix = self._prefix
        if self.deleted:
            tx.execute(sql.DELETE, (_listed([prefix + key for key in self.deleted]),))
        times: dict[int, list[str]] = {}
        for key, expires in self.touched.items():
            times.setdefault(expires, []).append(prefix + key)
        for expires, keys in times.items():
            tx.execute(sql.TOUCH, (expires, _listed(keys)))
        if self.stored:
            self._store(tx)
        if self.told:
            tx.told.update([prefix + key for key in self.told])

    def _store(self, tx: Transaction) -> None:
        prefix = self._prefix
        values: list[str | int | bytes] = []
        for key, row in self.stored.items():
            values += (prefix + key, *row)
        start = 0
        for size in PUT_SIZES:
            while len(values) - start >= 4 * size:
                end = start + 4 * size
                tx.execute(_PUTS[size], values[start:end])
                start = end

    def _expiry(self, ttl: float | None) -> int:
        return NEVER if ttl is None or ttl > LONGEST else self._now + int(ttl * 1e6)


_PUTS = {size: sql.PUT + ", ".join([sql.PUT_ROW] * size) + sql.PUT_OVER for size in PUT_SIZES}


def _versions(tx: Transaction, prefix: str, keys: Sequence[str], now: int) -> dict[str, int]:
    if len(keys) == 1:
        row = tx.execute(sql.VERSION_OF_ONE, (prefix + keys[0], now)).fetchone()
        return {keys[0]: row[0]} if row else {}
    (found,) = tx.execute(sql.VERSIONS, (_listed([prefix + key for key in keys]), now)).fetchone()
    return {keys[place]: version for place, version in _decode_versions(found or "[]")}


class Sweeper:
    """Removes what has expired, a little now and then; more often while there is more."""

    def __init__(self) -> None:
        self._due = 0.0

    def sweep(self, tx: Transaction) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + SWEEP_EVERY
        listed, count = tx.execute(sql.EXPIRED, (SWEEP_BYTES, _now(), SWEEP_ENTRIES)).fetchone()
        if not count:
            return
        removed = tx.execute(sql.REMOVE, (listed,)).rowcount
        if removed < count or count == SWEEP_ENTRIES:
            self._due = now


# -- following


def data_version(tx: Transaction) -> int:
    """Another number than last time, if another process has changed the file since."""
    return int(tx.execute(sql.DATA_VERSION).fetchone()[0])
