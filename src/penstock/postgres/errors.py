"""The driver's exceptions, and those of the server, as ours: one line that says what to do."""

from __future__ import annotations

import asyncio

import asyncpg

from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable, PublishError, one_line

AGAIN = {"40001", "40P01"}
"""Serialization failure, deadlock: done again at once, it works."""
NOT_THERE = {"3F000", "42P01", "42883"}
"""No such schema, table, function."""

STANDBY = "read only, a standby: name the primary, or wait until this one is promoted"

_NO_TLS = "rejected SSL upgrade"
"""In what the driver says of a server that answers something else than S, or an error, when TLS is asked for."""

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


_WITHIN = {
    **dict.fromkeys(NOT_THERE, "its database is not the broker's: schema {schema!r} is not there"),
    "25P02": "a statement in it has failed: roll it back",
    "25006": "it is READ ONLY, as asked for or as all are on a standby: begin one that may write",
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
    if isinstance(error, ConnectionError) and _NO_TLS in said:
        return BrokerRefused(f"{where}: it has no TLS, which sslmode asks for, or is no PostgreSQL: {said}")
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        wanted = said.rpartition("'")[0].rpartition("'")[2]
        return BrokerUnavailable(f"{where}: no host is {wanted} now, which target_session_attrs asks for")
    if isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | OSError) or code[:2] in (
        "08",
        "57",
        "53",
    ):
        return BrokerUnavailable(f"cannot reach {where}: {one_line(error)}")
    if isinstance(error, TimeoutError | asyncio.IncompleteReadError):
        return BrokerUnavailable(f"cannot reach {where}: it did not answer in time")
    return BrokerUnavailable(f"{where}: {code or type(error).__name__}: {said}")


def translate_within(error: BaseException, schema: str) -> BrokerError:
    """The same in a transaction of somebody else's, where some of it cannot heal."""
    why = _WITHIN.get(sqlstate(error))
    if why is None:
        return translate(error, "the transaction")
    return PublishError(f"the transaction: {why.format(schema=schema)} ({' '.join(str(error).split())})")


def _grant(code: str, said: str) -> str:
    if code != "42501":
        return ""
    if "database" in said:
        return ": have its owner say GRANT CREATE ON DATABASE … TO …, or CREATE SCHEMA … AUTHORIZATION …"
    return (
        ": have its owner say GRANT USAGE ON SCHEMA … TO …, GRANT ALL ON ALL TABLES IN SCHEMA … TO … "
        "and GRANT ALL ON ALL SEQUENCES IN SCHEMA … TO …"
    )
