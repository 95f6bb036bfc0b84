"""What a server is asked when a connection opens: whether it will keep what it confirms."""

from __future__ import annotations

import logging
from typing import NamedTuple

from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable
from penstock.redis.link import Link

log = logging.getLogger("penstock.redis")

_told: set[str] = set()


class Keeping(NamedTuple):
    """How a server keeps what it confirms; None: it does not say so to us."""

    journal: bool | None = None
    """Whether it writes an append-only file."""
    synced: bool | None = None
    """Whether each change is on the disk before it is confirmed, also while the file is written anew."""

    @property
    def durable(self) -> bool:
        return bool(self.journal and self.synced)

    def warn(self, where: str) -> None:
        """Say once of each server that it loses what it is given to keep. For whoever does so, not who only looks."""
        if self.journal is False and where not in _told:
            _told.add(where)
            log.warning("Redis at %s keeps nothing over its own death: appendonly is off", where)


async def survey(link: Link) -> Keeping:
    """Connect, and look at the server's settings once.

    :raises BrokerUnavailable: not reachable now.
    :raises BrokerRefused: it may remove what it was given to keep.
    """
    await link.line()
    try:
        said = _fields(await link.call("INFO", "memory")) | _fields(await link.call("INFO", "persistence"))
    except BrokerUnavailable:
        raise
    except BrokerError:  # no right to ask
        return Keeping()
    policy = said.get("maxmemory_policy", "noeviction")
    evicts = policy if policy.startswith("allkeys") and said.get("maxmemory", "0") != "0" else None
    journal = said["aof_enabled"] == "1" if "aof_enabled" in said else None
    where = link.address.name
    if evicts is not None and not link.address.evictable:
        raise BrokerRefused(
            f"Redis at {where} removes any key when its memory is full (maxmemory-policy {evicts}): set noeviction, "
            "or take the loss with ?evictable=true"
        )
    return Keeping(journal, await _synced(link))


async def _synced(link: Link) -> bool | None:
    try:
        said = await link.call("CONFIG", "GET", "*appendfsync*")
    except BrokerUnavailable:
        raise
    except BrokerError:
        return None
    told = dict(zip(said[::2], said[1::2], strict=True))
    if b"appendfsync" not in told:
        return None
    return bool(told[b"appendfsync"] == b"always" and told.get(b"no-appendfsync-on-rewrite") != b"yes")


def _fields(info: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in info.decode().splitlines())
    return {name: value for name, colon, value in lines if colon}
