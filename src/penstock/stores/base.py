"""The contract between Penstock and whatever remembers: results, schedules, limits, who is in charge.

A store is a map of versioned entries that live for as long as they are told to. Everything above it
(`ledger`, schedules, elections) is made of one operation: *change this entry if it is still the one I
read*. A store that carries that out atomically, entry by entry, can carry all of it; nothing here
needs transactions over several entries.

A version is never given twice to the same key, also after its entry has been deleted or has expired,
and a later one is the larger: it serves as an epoch too. Adapters never look into values.

A key is any text that has an encoding and holds no null character. Whoever makes keys of what a user
said sees to that: a call that names another one raises `ValueError`, and does nothing.

An adapter is one `Store` class. It keeps the promises of `penstock.testing.stores`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

import msgspec

ABSENT = 0
"""What `expect` says of an entry that must not exist."""


class StoreCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a store can do. Read by the engine, asserted by the suite."""

    durable: bool
    """A change that was confirmed survives the death of every process and a power cut."""
    shared: bool
    """Other processes see it."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """What is stored under a key."""

    key: str
    value: bytes
    version: int
    """Above 0; the larger, the later."""
    expires_at: float | None = None
    """Unix seconds; None: never."""


class Put(msgspec.Struct, frozen=True, gc=False):
    """Store a value, whole."""

    key: str
    value: bytes
    ttl: float | None = None
    """Seconds it lives from now on; None: for ever."""
    expect: int | None = None
    """Only if this is the entry's version (`ABSENT`: only if there is none); None: in any case."""
    tell: bool = False
    """Whoever follows the key hears of it."""


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Remove an entry. One that is not there counts as removed, unless a version is expected."""

    key: str
    expect: int | None = None
    tell: bool = False


class Touch(msgspec.Struct, frozen=True, gc=False):
    """Give an entry another time to live, counted from now; its value and version stay."""

    key: str
    ttl: float | None


Change: TypeAlias = Put | Delete | Touch


class Watch(Protocol):
    """Hears of changes to the keys it follows, made by whatever connection. That an entry expires is no
    change. Not shared between event loops."""

    async def follow(self, keys: Iterable[str]) -> None:
        """Hear of these keys too, whether or not they exist. When it returns, no change made with `tell` goes
        unheard. Nothing, once closed.

        :raises BrokerUnavailable: call again later.
        """
        ...

    def unfollow(self, keys: Iterable[str]) -> None:
        """Hear of these no more, also of what was told already. Keys that are not followed are no error."""
        ...

    async def receive(self, wait: float) -> set[str]:
        """The followed keys that may have changed since the last call, as soon as there is one; none after
        `wait` seconds. A key may be named without having changed. Cancel-safe. What changes while nobody
        receives is heard later, each key once.

        :raises BrokerUnavailable: changes may have gone unheard: look at every key, then call again.
        :raises BrokerRefused: never going to work again (the file was removed).
        """
        ...

    async def close(self) -> None:
        """Hear nothing more. Idempotent; wakes a blocked `receive`."""
        ...


class Store(Protocol):
    """An adapter: one place to remember things at one URL. Calls may be under way together."""

    capabilities: StoreCapabilities

    async def open(self) -> None:
        """Connect. Idempotent.

        :raises BrokerUnavailable: not reachable now.
        :raises BrokerRefused: never going to work (credentials, not a file of ours).
        """
        ...

    async def close(self) -> None:
        """Close every watch and the connection. Idempotent; it may be opened again. Cancelled, it cuts the connection:
        nothing more is said, and nothing waited for."""
        ...

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        """The entries of some keys, in their order; None for each that does not exist, or has expired.

        :raises BrokerUnavailable: call again later.
        """
        ...

    async def apply(self, changes: Sequence[Change]) -> list[int | None]:
        """Make changes, in one round trip and in their order, each atomically by itself.

        For each the version that its entry now has (0: it is gone), or None where the entry was not the
        expected one, or, of a `Touch`, did not exist: then nothing was done. When it returns, what was
        done is as durable as the store is.

        :raises BrokerUnavailable: what was done is not known.
        """
        ...

    async def scan(
        self, prefix: str, *, after: str | None = None, limit: int = 100, newest_first: bool = False
    ) -> list[Entry]:
        """Up to `limit` entries whose keys begin with `prefix`, in the order of their keys (by code point), or
        in the opposite one; only those beyond the key `after` in that order.

        :raises BrokerUnavailable: call again later.
        """
        ...

    def watch(self) -> Watch:
        """A new watch, which follows nothing yet."""
        ...


class StoreAdapter(Protocol):
    """How the registry makes a store of a URL."""

    def __call__(self, url: str) -> Store:
        """:raises ConfigError: a URL that can never work."""
        ...
