"""A schema of ours: made by whoever comes first, brought to this version by whoever has it first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg

from penstock.errors import BrokerRefused
from penstock.postgres.address import quoted
from penstock.postgres.consuming import CONSUMING
from penstock.postgres.entries import ENTRIES
from penstock.postgres.errors import NOT_THERE, sqlstate
from penstock.postgres.functions import COMMON
from penstock.postgres.lives import LIVES
from penstock.postgres.queues import QUEUES
from penstock.postgres.tables import TABLES

if TYPE_CHECKING:
    from asyncpg import Connection

VERSION = 1
MIGRATIONS: dict[int, str] = {}
"""What leads from a version to the next. It only adds: a process that was there before works on with it."""

FUNCTIONS = COMMON + QUEUES + CONSUMING + LIVES + ENTRIES

_BEGIN_BY_TIME = """
    SELECT setval(counter, (extract(epoch FROM clock_timestamp()) * 1e6)::bigint)
    FROM unnest(ARRAY[pg_get_serial_sequence('consumers', 'id'), 'versions']) counter"""
"""Whoever lived in a schema that was dropped must not take another's number in this one for his."""

_LOCK = 0x50454E53544F434B  # "PENSTOCK"


async def prepare(connection: Connection, schema: str) -> None:
    """Make sure that the schema is there, in this version.

    :raises BrokerRefused: it is of a later version, or not ours; the database is not in UTF-8.
    """
    found = await _version(connection, schema)
    if found == VERSION:
        return
    if found is None or found < VERSION:
        # Before the transaction: one that began to wait for it would not see what was made meanwhile.
        await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
        try:
            async with connection.transaction():
                await connection.execute("SET LOCAL statement_timeout TO 0")
                found = await _upgraded(connection, schema)
        finally:
            if not connection.is_closed():
                await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)
    if found > VERSION:
        raise BrokerRefused(
            f"schema {schema!r} is of version {found}, and this Penstock knows {VERSION}: install a later one"
        )


async def _upgraded(connection: Connection, schema: str) -> int:
    """The version that it has now."""
    found = await _version(connection, schema)
    if found is None:
        await _make(connection, schema)
        return VERSION
    if found < VERSION:
        await connection.execute(f"SET LOCAL search_path TO {quoted(schema)}, pg_temp")
        for version in range(found, VERSION):
            await connection.execute(MIGRATIONS[version])
        await connection.execute("UPDATE version SET version = $1", VERSION)
    return max(found, VERSION)


async def _version(connection: Connection, schema: str) -> int | None:
    table = f"{quoted(schema)}.version"
    if await connection.fetchval("SELECT to_regclass($1)", table) is None:
        return None
    try:
        found = await connection.fetchval(f"SELECT version FROM {table}")
    except asyncpg.PostgresError as error:
        if sqlstate(error) in NOT_THERE:  # dropped this very moment
            return None
        raise
    return int(found or 0)


async def _make(connection: Connection, schema: str) -> None:
    encoding = await connection.fetchval("SHOW server_encoding")
    if encoding != "UTF8":
        raise BrokerRefused(f"the database is in {encoding}, and Penstock needs one in UTF8")
    if not await connection.fetchval("SELECT 1 FROM pg_namespace WHERE nspname = $1", schema):
        await connection.execute(f"CREATE SCHEMA {quoted(schema)}")
    await connection.execute(f"SET LOCAL search_path TO {quoted(schema)}, pg_temp")
    try:
        await connection.execute(TABLES)
    except asyncpg.DuplicateTableError as error:
        raise BrokerRefused(f"schema {schema!r} is not one of Penstock's: {error}") from None
    await connection.execute(_BEGIN_BY_TIME)
    await connection.execute(FUNCTIONS)
    await connection.execute("INSERT INTO version VALUES ($1)", VERSION)
