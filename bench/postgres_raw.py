"""What asyncpg does by hand: the yardstick. Durable, by hundreds, one connection, no engine."""

from __future__ import annotations

import time

import asyncpg

SCHEMA = "penstock_bench_raw"

CLAIM = """
    UPDATE jobs SET owner = 1 WHERE id IN (
        SELECT id FROM jobs WHERE queue = 1 AND owner IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED)
    RETURNING id, body"""


async def connect(dsn: str) -> asyncpg.Connection:
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"""
        DROP SCHEMA IF EXISTS {SCHEMA} CASCADE; CREATE SCHEMA {SCHEMA}; SET search_path TO {SCHEMA};
        CREATE TABLE jobs (id bigserial PRIMARY KEY, queue int NOT NULL, body bytea NOT NULL, owner bigint);
        CREATE INDEX ready ON jobs (queue, id) WHERE owner IS NULL""")
    return connection


async def close(connection: asyncpg.Connection) -> None:
    await connection.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
    await connection.close()


async def publish(connection: asyncpg.Connection, bodies: list[bytes]) -> float:
    """Messages a second, all in one transaction."""
    start = time.perf_counter()
    await connection.execute("INSERT INTO jobs (queue, body) SELECT 1, unnest($1::bytea[])", bodies)
    return len(bodies) / (time.perf_counter() - start)


async def consume(connection: asyncpg.Connection, batch: int = 100) -> float:
    """Messages a second, claimed in one transaction and deleted in another, a hundred at a time."""
    start = time.perf_counter()
    count = 0
    while rows := await connection.fetch(CLAIM, batch):
        await connection.execute("DELETE FROM jobs WHERE id = ANY ($1)", [row["id"] for row in rows])
        count += len(rows)
    return count / (time.perf_counter() - start)
