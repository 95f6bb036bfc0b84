"""What SQLite's own driver does by hand: the yardstick. Durable, by hundreds, no engine."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

CLAIM = """
    UPDATE jobs SET owner = 'me' WHERE id IN (
        SELECT id FROM jobs WHERE queue = 'q' AND owner IS NULL ORDER BY id LIMIT ?)
    RETURNING id, body"""


def connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE jobs (id INTEGER PRIMARY KEY, queue TEXT, body BLOB, owner TEXT)")
    connection.execute("CREATE INDEX ready ON jobs (queue, id) WHERE owner IS NULL")
    return connection


def publish(connection: sqlite3.Connection, bodies: list[bytes]) -> float:
    """Messages a second, all in one transaction."""
    start = time.perf_counter()
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany("INSERT INTO jobs (queue, body) VALUES ('q', ?)", [(body,) for body in bodies])
    connection.execute("COMMIT")
    return len(bodies) / (time.perf_counter() - start)


def consume(connection: sqlite3.Connection, batch: int = 100) -> float:
    """Messages a second, claimed in one transaction and deleted in another, a hundred at a time."""
    start = time.perf_counter()
    count = 0
    while True:
        connection.execute("BEGIN IMMEDIATE")
        rows = connection.execute(CLAIM, (batch,)).fetchall()
        connection.execute("COMMIT")
        if not rows:
            return count / (time.perf_counter() - start)
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("DELETE FROM jobs WHERE id = ?", [(row[0],) for row in rows])
        connection.execute("COMMIT")
        count += len(rows)
