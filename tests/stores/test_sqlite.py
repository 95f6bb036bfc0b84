"""The SQLite store keeps the contract; and what is its own: one file, its form, its room."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.errors import BrokerRefused, BrokerUnavailable, ConfigError
from penstock.sqlite import schema
from penstock.sqlite.file import Transaction
from penstock.stores import registry
from penstock.stores.base import ABSENT, Delete, Put, StoreCapabilities, Touch
from penstock.stores.sqlite import SqliteStore, operations, sql
from penstock.testing.stores import StoreConformance, StoreHarness
from tests.servers import absent

FULL_DISK = Path(__file__).with_name("full_disk.py")


class TestSqliteStore(StoreConformance):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> StoreHarness:
        url = f"sqlite:///{tmp_path}/store.db"
        return StoreHarness(connect=lambda: SqliteStore(url))


def test_it_says_what_it_can_do() -> None:
    assert SqliteStore.capabilities == StoreCapabilities(durable=True, shared=True)


def rows(path: Path, statement: str, *values: object) -> list[tuple[object, ...]]:
    """What another program reads in the file."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(statement, values).fetchall()
    finally:
        connection.close()


async def value(store: SqliteStore, key: str) -> bytes | None:
    [entry] = await store.get([key])
    return None if entry is None else entry.value


# -- addresses


async def test_the_registry_knows_it(tmp_path: Path) -> None:
    store = registry.connect(f"sqlite:///{tmp_path}/store.db")
    assert isinstance(store, SqliteStore)
    await store.open()
    assert (tmp_path / "store.db").is_file()
    await store.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite://store.db", "sqlite://host/store.db"])
def test_a_url_without_a_file_is_refused_with_the_way_to_write_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"write sqlite:///relative\.db or sqlite:////absolute"):
        SqliteStore(url)


def test_an_unknown_option_is_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"no option 'vhots' \(did you mean 'vhost'\?\)"):
        SqliteStore("sqlite:///store.db?vhots=red")


async def test_namespaces_of_one_file_are_kept_apart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    names = ["", "a", "b", "a%2Fb", "a%252Fb", "a%00", "é"]
    stores = [SqliteStore(f"{url}?vhost={name}") for name in names]
    for name, store in zip(names, stores, strict=True):
        await store.apply([Put(key, name.encode(), expect=ABSENT) for key in ("k", "b/k", "/k")])
    for name, store in zip(names, stores, strict=True):
        for newest_first in (False, True):
            found = await store.scan("", newest_first=newest_first)
            assert {(entry.key, entry.value) for entry in found} == {(key, name.encode()) for key in ("k", "b/k", "/k")}
        assert await value(store, "b/k") == name.encode()
    red, bare = stores[1].watch(), stores[0].watch()
    await red.follow(["k"])
    await bare.follow(["a/k", "k"])
    await stores[1].apply([Put("k", b"", tell=True)])
    assert await red.receive(10.0) == {"k"}
    assert await bare.receive(0.1) == set()
    stores.append(SqliteStore(f"{url}?vhost=/a/"))
    assert await value(stores[-1], "k") == b""
    for store in stores:
        await store.close()


# -- files that will not do


async def test_the_database_of_another_program_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE accounts (id)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    store = SqliteStore(f"sqlite:///{path}")
    for _ in range(2):
        with pytest.raises(BrokerRefused, match="something else"):
            await store.open()
    await store.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_removed_while_in_use_ends_everything_with_an_error(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "store.db"
    store = SqliteStore(f"sqlite:///{path}")
    await store.apply([Put("k", b"")])
    watch = store.watch()
    await watch.follow(["k"])
    receiving = asyncio.create_task(watch.receive(30.0))
    path.unlink()
    if replaced:
        path.touch()
    for work in (store.apply([Put("k", b"")]), store.get(["k"]), store.scan(""), store.open(), receiving):
        with pytest.raises(BrokerRefused, match="removed or replaced"):
            await work
    await store.close()


# -- its form


async def plan(store: SqliteStore, statement: str, *values: object) -> str:
    found = await store.file.submit(lambda tx: tx.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall())
    return "\n".join(str(row[3]) for row in found)


@pytest.mark.parametrize("statement", [sql.SCAN_UP, sql.SCAN_DOWN], ids=["ascending", "descending"])
async def test_a_scan_is_a_range_of_the_index_and_sorts_nothing(tmp_path: Path, statement: str) -> None:
    store = SqliteStore(f"sqlite:///{tmp_path}/store.db")
    steps = await plan(store, statement, "a", "b", 0, 10)
    assert "SEARCH entries USING INDEX sqlite_autoindex_entries_1 (key>? AND key<?)" in steps
    assert "TEMP B-TREE" not in steps
    await store.close()


async def test_sweeping_looks_only_at_what_has_expired(tmp_path: Path) -> None:
    store = SqliteStore(f"sqlite:///{tmp_path}/store.db")
    steps = await plan(store, sql.EXPIRED, 1, 1, 1)
    assert "SEARCH entries USING INDEX entries_expiring (expires<?)" in steps
    await store.close()


async def test_values_that_together_are_larger_than_sqlite_joins_are_read_all_the_same(tmp_path: Path) -> None:
    store = SqliteStore(f"sqlite:///{tmp_path}/store.db")
    values = {f"{number:02}": bytes([number]) * 90_000 for number in range(40)}
    await store.apply([Put(key, value) for key, value in values.items()])

    def limit(tx: Transaction) -> None:
        connection: sqlite3.Connection = tx.execute("SELECT 1").connection
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)

    await store.file.submit(limit)
    for found in (
        await store.get([*values, "none"]),
        await store.scan("", limit=50),
        (await store.scan("", limit=50, newest_first=True))[::-1],
    ):
        assert {entry.key: entry.value for entry in found if entry is not None} == values
    await store.close()


# -- time


async def test_at_the_very_moment_an_entry_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_700_000_000_000_000]
    monkeypatch.setattr(operations, "_now", lambda: now[0])
    store = SqliteStore(f"sqlite:///{tmp_path}/store.db")
    [version] = await store.apply([Put("k", b"v", ttl=10.0)])
    now[0] += 9_999_999
    [entry] = await store.get(["k"])
    assert entry is not None
    assert entry.expires_at == 1_700_000_010.0
    assert [one.key for one in await store.scan("")] == ["k"]
    now[0] += 1
    assert await store.get(["k"]) == [None]
    assert await store.get(["k", "x"]) == [None, None]
    assert await store.scan("") == []
    outcomes = await store.apply([Touch("k", 5.0), Delete("k", expect=version), Put("k", b"", expect=ABSENT)])
    assert outcomes[:2] == [None, None]
    assert outcomes[2] is not None
    await store.close()


async def test_what_has_expired_is_swept_a_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.db"
    monkeypatch.setattr(operations, "SWEEP_ENTRIES", 30)
    monkeypatch.setattr(operations, "SWEEP_BYTES", 10_000)
    store = SqliteStore(f"sqlite:///{path}")
    store._sweeper._due = float("inf")
    await store.apply([Put(f"large{number}", b"x" * 4000, ttl=-1.0) for number in range(6)])
    await store.apply([Put(f"small{number:03}", b"", ttl=-0.5) for number in range(100)])
    await store.apply([Put("stays", b"", ttl=1000.0), Put("for ever", b"")])

    def count() -> int:
        return int(str(rows(path, "SELECT count(*) FROM entries")[0][0]))

    counts = [count()]
    while counts[-1] > 2:
        assert len(counts) < 20
        store._sweeper._due = 0.0
        await store.apply([Touch("stays", 1000.0)])
        counts.append(count())
    steps = [before - after for before, after in itertools.pairwise(counts)]
    assert max(steps) <= 30
    assert steps[0] <= 3, "the large ones count by their bytes"
    assert [entry.key for entry in await store.scan("")] == ["for ever", "stays"]
    await store.close()


async def test_sweeping_does_not_rest_while_there_is_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.db"
    monkeypatch.setattr(operations, "SWEEP_ENTRIES", 50)
    monkeypatch.setattr(operations, "SWEEP_EVERY", 1000.0)
    store = SqliteStore(f"sqlite:///{path}")
    store._sweeper._due = float("inf")
    await store.apply([Put(f"k{number}", b"", ttl=-1.0) for number in range(1000)])
    store._sweeper._due = 0.0
    for _ in range(25):
        await store.apply([Delete("k")])
    assert rows(path, "SELECT count(*) FROM entries") == [(0,)]
    await store.apply([Put("k", b"", ttl=-1.0)])
    assert rows(path, "SELECT count(*) FROM entries") == [(1,)], "there is time until the next sweep"
    await store.close()


# -- no room


async def test_without_room_nothing_is_half_done_and_what_was_confirmed_is_intact(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = SqliteStore(f"sqlite:///{path}")
    await store.apply([Put("old", b"old"), Put("other", b"old")])

    def allow(more_pages: int) -> Callable[[Transaction], object]:
        def run(tx: Transaction) -> object:
            count = tx.execute("PRAGMA page_count").fetchone()[0]
            return tx.execute(f"PRAGMA max_page_count = {count + more_pages}").fetchone()

        return run

    await store.file.submit(allow(10))
    watch = store.watch()
    await watch.follow(["old", "other", "new", "small"])
    small, large, after = await asyncio.gather(
        store.apply([Put("small", b"s", tell=True)]),
        store.apply([Put("old", b"new", tell=True), Delete("other", tell=True), Put("new", b"x" * 100_000)]),
        store.apply([Put("small", b"after", tell=True)]),
        return_exceptions=True,
    )
    assert isinstance(large, BrokerUnavailable), large
    assert "the disk is full" in str(large)
    assert not isinstance(small, BaseException)
    assert not isinstance(after, BaseException)
    found = [entry and entry.value for entry in await store.get(["old", "other", "new", "small"])]
    assert found == [b"old", b"old", None, b"after"]
    assert await watch.receive(10.0) == {"small"}
    await store.file.submit(allow(1000))
    assert None not in await store.apply([Put("old", b"new"), Delete("other"), Put("new", b"x" * 100_000)])
    await store.close()
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


async def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """A file system of its own that is really full, in the WAL and under everything else SQLite writes."""
    place = tmp_path / "small"
    place.mkdir()
    ballast = place / "ballast"
    steps = (
        f"mount -t tmpfs -o size=12m small {place} || exit 77; head -c 9000000 /dev/zero > {ballast}; "
        f"exec {sys.executable} {FULL_DISK} {place} {ballast}"
    )
    try:
        process = await asyncio.create_subprocess_exec(
            *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", steps), stderr=asyncio.subprocess.PIPE
        )
    except FileNotFoundError:
        absent("needs unshare to mount a small file system")
    _, stderr = await process.communicate()
    if process.returncode == 77 or b"unshare" in stderr:
        absent("needs the right to mount a small file system")
    assert process.returncode == 0, stderr.decode()


def test_what_never_expires_is_not_in_the_index_of_what_does(tmp_path: Path) -> None:
    assert f"expires < {schema.NEVER}" in schema.ENTRIES
    assert f"expires < {schema.NEVER}" in sql.EXPIRED
