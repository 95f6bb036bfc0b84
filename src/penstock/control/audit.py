"""The audit: who changed what, and when. Kept in the store, ninety days."""

from __future__ import annotations

import logging
import os

import msgspec

from penstock.clock import SYSTEM_CLOCK, Clock
from penstock.control.masking import line
from penstock.errors import one_line
from penstock.stores.base import ABSENT, Put, Store
from penstock.stores.keys import check_keys

log = logging.getLogger("penstock.audit")

TTL = 90 * 86_400.0
"""Seconds that an entry is kept."""
SHORT, LONG = 200, 1000
"""Characters of a name, and of a detail."""
MOST = 1000
"""Entries that are read together."""
PREFIX = "audit/"


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was done, or refused."""

    id: str
    """In the order of time; `Audit.latest(after=…)` takes it."""
    at: float
    """Unix seconds."""
    who: str
    what: str
    """The deed in one word or two: `task.cancel`, `worker.restart`, `definition.put`."""
    target: str
    detail: str
    outcome: str
    """`ok`, or why not."""


class Audit:
    """Writes down what was done, and tells it again. For one event loop; the store stays open."""

    def __init__(self, store: Store, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._clock = clock
        self._last = 0

    async def write(self, who: str, what: str, target: str, detail: str = "", outcome: str = "ok") -> None:
        """One more entry: each text on one line, without what looks like a secret, and cut.

        Entries of one process are in the order in which they were written, also where a clock is put back.

        :raises BrokerUnavailable: the store is away; whether it is written is not known.
        """
        now = self._clock.time()
        self._last = max(int(now * 1_000_000), self._last + 1)
        entry = AuditEntry(
            id=f"{self._last:016x}.{os.urandom(6).hex()}",
            at=now,
            who=line(who, SHORT),
            what=line(what, SHORT),
            target=line(target, SHORT),
            detail=line(detail, LONG),
            outcome=line(outcome, LONG),
        )
        log.info(
            "%s: %s %s: %s%s",
            entry.who,
            entry.what,
            entry.target,
            entry.outcome,
            f" ({entry.detail})" * bool(entry.detail),
        )
        await self._store.apply([Put(PREFIX + entry.id, msgspec.json.encode(entry), TTL, ABSENT)])

    async def latest(self, limit: int = 100, after: str | None = None) -> list[AuditEntry]:
        """The latest entries, the newest first, 1000 at most; those before the entry with the id `after`.

        :raises BrokerUnavailable: the store is away.
        :raises ValueError: an `after` that can be no id.
        """
        beyond = None if after is None else PREFIX + after
        check_keys([] if beyond is None else [beyond])
        found = await self._store.scan(PREFIX, after=beyond, limit=max(min(limit, MOST), 1), newest_first=True)
        return [_read(entry.key.removeprefix(PREFIX), entry.value) for entry in found]


def _read(id: str, value: bytes) -> AuditEntry:
    """An entry; one that cannot be read says so, and hides no other."""
    try:
        return msgspec.json.decode(value, type=AuditEntry)
    except (msgspec.DecodeError, UnicodeError) as error:
        return AuditEntry(
            id=id, at=0.0, who="", what="", target="", detail="", outcome=f"unreadable: {one_line(error)}"
        )
