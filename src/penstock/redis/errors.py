"""What a Redis server refuses, in our words."""

from __future__ import annotations

from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable


class Reply(Exception):
    """An error that the server answered with, as it said it."""

    @property
    def code(self) -> str:
        """What it is: ERR, OOM, NOPERM, …; also where a script met it."""
        return _code(str(self))


class NotNow(BrokerUnavailable):
    """The server says that it cannot do it now: nothing was done."""


class NoRoom(NotNow):
    """The server has no memory, or no disk, to write to."""


_REFUSED = {
    "NOAUTH": "wants a password: write redis://user:password@host",
    "WRONGPASS": "refuses this user or password",
    "NOPERM": "does not let this user do that",
    "WRONGTYPE": "has something else under a key of ours: use another database or ?vhost=",
    "DENIED": "is in protected mode and takes no connection from here",
    "NOPROTO": "is too old: Redis 6.2 or newer is needed",
}
_UNAVAILABLE = {
    "READONLY": "is a read-only replica: give the address of its primary",
    "LOADING": "is still loading its data",
    "MASTERDOWN": "has lost its primary",
    "CLUSTERDOWN": "belongs to a cluster that is down",
    "TRYAGAIN": "is moving keys within its cluster",
    "MOVED": "has handed its keys to another node",
    "ASK": "is handing its keys to another node",
    "BUSY": "is busy with somebody's script",
    "NOREPLICAS": "has too few replicas to write (min-replicas-to-write)",
    "UNBLOCKED": "ended the wait",
    "NOTREADY": "is not ready",
}
_FULL = {
    "OOM": "is at its maxmemory",
    "MISCONF": "cannot write to its disk and takes no more writes",
}
_KNOWN = (*_REFUSED, *_UNAVAILABLE, *_FULL)
_SAID = {
    "db index is out of range": "has no such database",
    "invalid db index": "has no such database",
    "select is not allowed in cluster mode": "is a cluster, which has no database but 0",
    "without any password configured": "knows no password: leave it out of the URL",
    "invalid password": "refuses this password",
    "the user executing the script can't": "does not let this user do that",
    "unknown command": "lacks a command: Redis 6.2 or newer is needed",
}


def translate(reply: Reply, where: str) -> BrokerError:
    """The error to raise for what `where` answered."""
    said = " ".join(str(reply).split())
    code = reply.code
    if code in _FULL:
        return NoRoom(f"Redis at {where} {_FULL[code]} ({said})")
    if code in _UNAVAILABLE:
        return NotNow(f"Redis at {where} {_UNAVAILABLE[code]} ({said})")
    if code in _REFUSED:
        return BrokerRefused(f"Redis at {where} {_REFUSED[code]} ({said})")
    if "max number of clients" in said:
        return BrokerUnavailable(f"Redis at {where} has as many connections as it takes ({said})")
    for part, words in _SAID.items():
        if part in said.lower():
            return BrokerRefused(f"Redis at {where} {words} ({said})")
    return BrokerError(f"Redis at {where}: {said}")


def _code(said: str) -> str:
    """The known code that an error begins with; or holds, where a script met it (Redis 6)."""
    first = said.partition(" ")[0]
    if first in _KNOWN:
        return first
    return next((code for code in _KNOWN if f"-{code} " in said), first)
