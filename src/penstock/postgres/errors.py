"""The driver's exceptions, and those of the server, as ours: one line that says what to do."""

from __future__ import annotations

import asyncio

import asyncpg

from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable, one_line

AGAIN = {"40001", "40P01"}
"""Serialization failure, deadlock: done again at once, it works."""
NOT_THERE = {"3F000", "42P01", "42883"}
"""No such schema, table, function."""

STANDBY = "read only, a standby: name the primary, or wait until this one is promoted"

_REFUSED = {
    "28P01": "wrong password",
    "28000": "not let in",
    "3D000": "no such database",
    "42501": "no right",
}
_FOR_NOW = {
    "53300": "no connection is left (max_connections): close some, or let PgBouncer share them",
    "53100": "no room on its disk",
    "53200": "out of memory",
    "57P01": "it is shutting down, or the connection was ended there",
    "57P02": "it has crashed and restarts",
    "57P03": "it is starting up or shutting down",
    "57014": "the statement was cancelled there",
    "55P03": "a lock was not to be had",
    "25006": STANDBY,
}


class DiskFull(BrokerUnavailable):
    """No room to write; what was confirmed is intact."""


class NotBegun(BrokerUnavailable):
    """No connection was to be had: nothing was done."""


class NoConnection(NotBegun):
    """The server has as many as it takes."""


def sqlstate(error: BaseException) -> str:
    """Five characters, of the server or of psycopg; none for other errors."""
    return str(getattr(error, "sqlstate", None) or "")


def translate(error: BaseException, where: str) -> BrokerError:
    """What a failed connection or statement means. `where` names the server, fit for a log."""
    code = sqlstate(error)
    said = " ".join(str(error).split())
    if code in _REFUSED:
        return BrokerRefused(f"{where}: {_REFUSED[code]}: {said}{_grant(code, said)}")
    if code == "53100":
        return DiskFull(f"{where}: {_FOR_NOW[code]}: {said}")
    if code == "53300":
        return NoConnection(f"{where}: {_FOR_NOW[code]}: {said}")
    if code in _FOR_NOW:
        return BrokerUnavailable(f"{where}: {_FOR_NOW[code]}: {said}")
    if isinstance(error, asyncpg.DataError) or code[:2] in ("22", "54"):  # what no database could keep, or not this one
        return BrokerError(f"{where}: {said}")
    if isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | OSError) or code[:2] in (
        "08",
        "57",
        "53",
    ):
        return BrokerUnavailable(f"cannot reach {where}: {one_line(error)}")
    if isinstance(error, TimeoutError | asyncio.IncompleteReadError):
        return BrokerUnavailable(f"cannot reach {where}: it did not answer in time")
    return BrokerUnavailable(f"{where}: {code or type(error).__name__}: {said}")


def _grant(code: str, said: str) -> str:
    if code != "42501":
        return ""
    if "database" in said:
        return ": have its owner say GRANT CREATE ON DATABASE … TO …, or CREATE SCHEMA … AUTHORIZATION …"
    return (
        ": have its owner say GRANT USAGE ON SCHEMA … TO …, GRANT ALL ON ALL TABLES IN SCHEMA … TO … "
        "and GRANT ALL ON ALL SEQUENCES IN SCHEMA … TO …"
    )
