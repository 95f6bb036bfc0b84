"""Files of schema 1, from before there were entries: they are brought up to date in place."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.brokers.sqlite import SqliteBroker
from penstock.errors import BrokerRefused
from penstock.sqlite import schema
from penstock.stores.base import Put
from penstock.stores.sqlite import SqliteStore

OLD_SCHEMA = Path(__file__).with_name("schema_1.sql")
CHANGER = Path(__file__).with_name("changer.py")
MESSAGE = """
    INSERT INTO messages (queue, rank, meta, body)
    VALUES (1, 0, '["old","work",null,0,1700000000.0,null,{}]', x'00ff')"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of schema 1 with a queue and a message in it."""
    path = tmp_path / "old.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(OLD_SCHEMA.read_text())
    connection.execute("INSERT INTO queues (namespace, name, ordered) VALUES ('', 'work', 0)")
    connection.execute("INSERT INTO bindings (namespace, topic, queue) VALUES ('', 'work', 1)")
    connection.execute(MESSAGE)
    connection.close()
    return path


@pytest.fixture
def old_process(path: Path) -> Iterator[sqlite3.Connection]:
    """One that has opened the file before it was brought up to date."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("SELECT count(*) FROM messages").fetchone()
    yield connection
    connection.close()


def version(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])
    finally:
        connection.close()


def form(path: Path) -> set[tuple[str, str]]:
    connection = sqlite3.connect(path)
    try:
        found = connection.execute("SELECT name, sql FROM sqlite_master").fetchall()
        return {(name, " ".join(str(text).replace("IF NOT EXISTS ", "").split())) for name, text in found}
    finally:
        connection.close()


async def queued(path: Path) -> list[tuple[str, bytes]]:
    broker = SqliteBroker(f"sqlite:///{path}")
    deliveries, _ = await broker.admin.browse("work", 10)
    await broker.close()
    return [(one.id, one.raw) for one in deliveries]


async def test_what_was_in_the_file_stays_and_entries_can_be_kept_beside_it(path: Path) -> None:
    assert version(path) == 1
    for number in range(3):
        store = SqliteStore(f"sqlite:///{path}")
        assert await store.apply([Put("k", b"")]) == [number + 1]
        await store.close()
        assert version(path) == schema.VERSION == 2
    assert await queued(path) == [("old", b"\x00\xff")]


async def test_a_broker_alone_brings_it_up_to_date_as_well(path: Path) -> None:
    assert await queued(path) == [("old", b"\x00\xff")]
    assert version(path) == schema.VERSION


async def test_it_has_the_form_of_a_new_file(path: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.db"
    for one in (path, new):
        store = SqliteStore(f"sqlite:///{one}")
        await store.open()
        await store.close()
    assert form(path) == form(new)


async def test_a_process_that_has_it_open_works_on(path: Path, old_process: sqlite3.Connection) -> None:
    store = SqliteStore(f"sqlite:///{path}")
    await store.apply([Put("k", b"")])
    old_process.execute(MESSAGE)
    assert await queued(path) == [("old", b"\x00\xff")] * 2
    await store.close()


async def test_processes_that_open_it_together_bring_it_up_to_date_once(path: Path) -> None:
    url = f"sqlite:///{path}"
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, str(CHANGER), url, f"{number}/", "5", "5"), stdout=asyncio.subprocess.PIPE
        )
        for number in range(4)
    ]
    outputs = await asyncio.gather(*(process.communicate() for process in processes))
    assert [process.returncode for process in processes] == [0] * 4
    versions = [int(line.split()[1]) for stdout, _ in outputs for line in stdout.decode().splitlines()]
    assert sorted(versions) == list(range(1, 21))
    assert await queued(path) == [("old", b"\x00\xff")]


async def test_one_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = form(path)
    store = SqliteStore(f"sqlite:///{path}")
    with monkeypatch.context() as patch:
        patch.setitem(schema.MIGRATIONS, 1, schema.ENTRIES + "INSERT INTO nowhere VALUES (1);")
        with pytest.raises(BrokerRefused, match="nowhere"):
            await store.open()
    assert version(path) == 1
    assert form(path) == before
    await store.apply([Put("k", b"")])
    assert version(path) == 2
    await store.close()


@pytest.mark.parametrize("other", [0, 3, 99])
async def test_another_schema_is_named_and_refused(path: Path, other: int) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {other}")
    connection.close()
    store = SqliteStore(f"sqlite:///{path}")
    with pytest.raises(BrokerRefused, match=f"has schema {other}; this Penstock knows schema {schema.VERSION}"):
        await store.open()
    await store.close()
    assert version(path) == other
