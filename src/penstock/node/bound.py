"""To which topics the jobs of a cluster are bound, so that whoever finds one that is gone can unbind it.

bound/<job>   its topics: from before they are bound until after they are unbound
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

import msgspec

from penstock.errors import BrokerUnavailable
from penstock.stores.base import ABSENT, Change, Delete, Entry, Put, Store
from penstock.stores.scanning import all_under

PREFIX = "bound/"
TRIES = 20  # of a change that others come before


class Bound:
    """The topics in a store. For one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, frozenset[str]] = {}

    @property
    def jobs(self) -> list[str]:
        """Those that are bound to a topic, as far as this was read."""
        return list(self._known)

    def of(self, job: str) -> frozenset[str]:
        return self._known.get(job, frozenset())

    async def read(self) -> None:
        """:raises BrokerUnavailable: call again later."""
        entries = await all_under(self._store, PREFIX)
        self._known = {entry.key.removeprefix(PREFIX): _topics(entry) for entry in entries}

    async def add(self, job: str, topics: Iterable[str]) -> None:
        """Before they are bound.

        :raises BrokerUnavailable: call again later.
        """
        more = frozenset(topics)
        if more:
            await self._change(job, lambda old: old | more)

    async def remove(self, job: str, topics: Iterable[str]) -> None:
        """Once they are unbound.

        :raises BrokerUnavailable: call again later.
        """
        fewer = frozenset(topics)
        await self._change(job, lambda old: old - fewer)

    async def _change(self, job: str, change: Callable[[frozenset[str]], frozenset[str]]) -> None:
        key = PREFIX + job
        for _ in range(TRIES):
            (entry,) = await self._store.get([key])
            old = frozenset[str]() if entry is None else _topics(entry)
            new, expected = change(old), ABSENT if entry is None else entry.version
            made: Change = Put(key, _encode(new), expect=expected) if new else Delete(key, expect=expected)
            if new == old or (await self._store.apply([made]))[0] is not None:
                self._known.pop(job, None)
                if new:
                    self._known[job] = new
                return
        raise BrokerUnavailable(f"the topics of job {job} are being changed by others all the time")


def _topics(entry: Entry) -> frozenset[str]:
    """None of an entry of another version: its nodes unbind them."""
    try:
        return _decode(entry.value)
    except msgspec.DecodeError:
        return frozenset()


def _encode(topics: Set[str]) -> bytes:
    return msgspec.msgpack.encode(sorted(topics))


_decode = msgspec.msgpack.Decoder(frozenset[str]).decode
