"""Who shares a SQLite file: the broker of the same process, other processes, and the children of a fork."""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from penstock.brokers.base import Queue
from penstock.brokers.sqlite import SqliteBroker
from penstock.message import Outgoing
from penstock.sqlite import presence, schema
from penstock.sqlite.file import LAST_WAIT, SqliteFile, Transaction
from penstock.sqlite.wake import bucket, buckets
from penstock.stores.base import ABSENT, Delete, Put
from penstock.stores.sqlite import SqliteStore
from penstock.stores.sqlite.watch import LOOK, SqliteWatch
from penstock.testing.waiting import eventually

CHANGER = Path(__file__).with_name("changer.py")
LISTENERS = "SELECT count(*) FROM consumers JOIN consuming ON consumer = id WHERE queue = ?"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shared.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


async def changer(url: str, prefix: str, keys: int, *count: str) -> asyncio.subprocess.Process:
    arguments = (sys.executable, str(CHANGER), url, prefix, str(keys), *count)
    return await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)


def rows(path: Path, statement: str, *values: object) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(statement, values).fetchall()
    finally:
        connection.close()


def listeners(path: Path) -> int:
    return int(rows(path, LISTENERS, schema.WATCHES)[0][0])


# -- with a broker


async def test_broker_and_store_of_one_process_share_the_file_and_its_groups(
    url: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, store = SqliteBroker(url), SqliteStore(url)
    await broker.declare(Queue("work"))
    await store.open()
    assert broker.file is store.file
    groups: list[int] = []
    real = SqliteFile._transact

    def counted(self: SqliteFile, works: list[Any]) -> Any:
        groups.append(len(works))
        return real(self, works)

    begun, held = threading.Event(), threading.Event()

    def hold(tx: Transaction) -> None:
        begun.set()
        held.wait(10.0)

    blocked = store.file.submit(hold)
    await asyncio.to_thread(begun.wait)
    monkeypatch.setattr(SqliteFile, "_transact", counted)
    message = Outgoing(id="m", topic="work", body=b"")
    together = asyncio.gather(broker.publish([message]), store.apply([Put("k", b"")]), store.apply([Delete("k")]))
    await asyncio.sleep(0)
    held.set()
    published, put, deleted = await together
    await blocked
    assert (list(published), put, deleted) == ([None], [1], [0])
    assert groups == [3]
    await broker.close()
    assert await store.get(["k"]) == [None]  # the file is closed by the last one out
    await store.close()
    assert str(path) not in SqliteFile._open


async def test_a_broker_that_gives_up_the_dead_leaves_what_the_store_holds(url: str, path: Path) -> None:
    broker, store = SqliteBroker(url), SqliteStore(url)
    watch = store.watch()
    await watch.follow(["k"])
    await broker.declare(Queue("work"))
    subscription = broker.subscribe([Queue("work")], prefetch=1, lease=0.6, on_lost=lambda lost: None)
    await subscription.receive(1, 1.5)
    assert listeners(path) == 1
    await store.apply([Put("k", b"", tell=True)])
    assert await watch.receive(10.0) == {"k"}
    await broker.close()
    await store.close()


# -- who listens


async def test_nobody_is_written_to_or_woken_when_nobody_follows(
    url: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(url)
    await store.open()
    monkeypatch.setattr(store.file.wake_up, "send", lambda *what: pytest.fail("a datagram was sent"))
    await store.apply([Put("k", b"", tell=True), Delete("k", tell=True)])
    idle = store.watch()
    assert await idle.receive(0.0) == set()
    assert store.file.wake_up.port == 0
    assert rows(path, "SELECT count(*) FROM consumers") == [(0,)]
    assert rows(path, "SELECT count(*) FROM broadcasts") == [(0,)]
    await store.close()


async def test_whoever_follows_is_in_the_file_until_it_is_closed(url: str, path: Path) -> None:
    store = SqliteStore(url)
    first, second = store.watch(), store.watch()
    await first.follow(["a"])
    await first.follow(["b"])
    await second.follow(["a"])
    assert listeners(path) == 2
    await first.close()
    assert listeners(path) == 1
    await store.close()
    assert listeners(path) == 0
    assert rows(path, "SELECT count(*) FROM consumers") == [(0,)]


async def test_a_cancelled_follow_leaves_one_presence_and_closing_none(url: str, path: Path) -> None:
    store = SqliteStore(url)
    await store.open()
    for turns in range(6):
        watch = store.watch()
        following = asyncio.create_task(watch.follow(["k"]))
        for _ in range(turns):
            await asyncio.sleep(0)
        following.cancel()
        await asyncio.wait({following})
        if turns % 2:
            await watch.follow(["k"])
            assert listeners(path) == 1
        await watch.close()
        assert listeners(path) == 0
    await store.close()


async def test_the_dead_are_forgotten_after_their_lease_and_the_living_are_not(url: str, path: Path) -> None:
    store = SqliteStore(url)
    await store.open()

    def bury(tx: Transaction) -> None:
        now = time.monotonic()
        for deadline, queue_id in ((now - 1, schema.WATCHES), (now + 50, schema.WATCHES), (now - 1, 77)):
            lease = 5.0 if deadline < now else 50.0
            row = tx.execute("INSERT INTO consumers (port, deadline, lease) VALUES (9, ?, ?)", (deadline, lease))
            tx.execute("INSERT INTO consuming (consumer, queue) VALUES (?, ?)", (row.lastrowid, queue_id))

    await store.file.submit(bury)
    watch = store.watch()
    await watch.follow(["k"])
    assert listeners(path) == 2
    assert rows(path, LISTENERS, 77) == [(1,)], "a consumer of messages is not the store's to give up"
    await store.close()


async def test_one_that_was_given_up_for_dead_comes_back_and_names_all_it_follows(url: str, path: Path) -> None:
    store = SqliteStore(url)
    watch = store.watch()
    watch._presence._lease = 0.3
    await watch.follow(["a", "b"])
    await store.file.submit(lambda tx: (tx.execute("DELETE FROM consumers"), tx.execute("DELETE FROM consuming")))
    assert await watch.receive(10.0) == {"a", "b"}
    assert listeners(path) == 1
    process = await changer(url, "a", 1, "1")
    await process.communicate()
    watch.unfollow(["a"])
    await store.close()


async def test_the_lease_is_renewed(url: str, path: Path) -> None:
    store = SqliteStore(url)
    watch = store.watch()
    watch._presence._lease = 0.3
    await watch.follow(["k"])
    [before] = rows(path, "SELECT id, deadline FROM consumers")

    async def renewed() -> bool:
        [(deadline,)] = await asyncio.to_thread(rows, path, "SELECT deadline FROM consumers")
        return bool(deadline > before[1] + 0.3)

    await eventually(renewed)
    assert rows(path, "SELECT id FROM consumers") == [before[:1]]
    assert await watch.receive(0.0) == set()
    await store.close()
    assert presence.LEASE > 3 * LOOK


# -- other processes


async def test_a_change_in_another_process_is_heard_long_before_the_next_look(url: str) -> None:
    store = SqliteStore(url)
    watch = store.watch()
    await watch.follow([f"far/{number}" for number in range(200)])
    process = await changer(url, "far/", 20, "20")
    assert process.stdout is not None
    latencies, heard, exact = [], set[str](), 0
    while line := await process.stdout.readline():
        confirmed = time.monotonic()
        number, version = line.decode().split()
        while f"far/{number}" not in heard:  # it may have been named before we read that it is confirmed
            named = await watch.receive(10.0)
            exact += len(named) <= 20
            heard |= named
        latencies.append(time.monotonic() - confirmed)
        [entry] = await store.get([f"far/{number}"])
        assert entry is not None
        assert entry.version == int(version)
    await process.communicate()
    assert len(latencies) == 20
    assert sorted(latencies)[10] < LOOK / 5
    assert exact, "a datagram names what was changed; only a look names all that is followed"
    await store.close()


async def test_a_lost_wake_up_costs_no_more_than_a_look(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteStore(url)
    watch = store.watch()
    await watch.follow(["far/0", "far/1"])
    monkeypatch.setattr(store.file.wake_up, "_heard", lambda ids: None)
    receiving = asyncio.create_task(watch.receive(30.0))
    process = await changer(url, "far/", 1, "1")
    await process.communicate()
    async with asyncio.timeout(5 * LOOK):
        assert "far/0" in await receiving
    await store.close()


async def test_without_changes_of_others_a_look_names_nothing(url: str) -> None:
    store = SqliteStore(url)
    watch = store.watch()
    await watch.follow(["k"])
    for _ in range(4):
        await store.apply([Put("k", b""), Put("other", b"", tell=True)])
        watch._next_look = 0.0
        assert await watch.receive(0.05) == set()
    await store.close()


async def test_counters_raised_by_several_processes_go_up_together(url: str) -> None:
    """Versions are one sequence for all: every one is given once."""
    processes = [await changer(url, "k", 3, "30") for _ in range(3)]
    outputs = await asyncio.gather(*(process.communicate() for process in processes))
    each = [[int(line.split()[1]) for line in stdout.decode().splitlines()] for stdout, _ in outputs]
    for versions in each:
        assert versions == sorted(versions)
    assert sorted(itertools.chain(*each)) == list(range(1, 91))


async def test_changers_killed_again_and_again_leave_all_they_confirmed(url: str, path: Path) -> None:
    store = SqliteStore(url)
    last = 0
    for kill in range(8):
        process = await changer(url, f"{kill}/", 7)
        assert process.stdout is not None
        for _ in range(3 + kill):
            await process.stdout.readline()
        process.kill()
        await process.communicate()
        entries = await store.scan(f"{kill}/")
        assert sorted(int(entry.value) for entry in entries)[0] >= 0
        confirmed = max(int(entry.value) for entry in entries)
        assert confirmed >= 2 + kill
        assert {int(entry.value) for entry in entries} == set(range(max(confirmed - 6, 0), confirmed + 1))
        assert min(entry.version for entry in entries) > last
        last = max(entry.version for entry in entries)
    await store.close()
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


def test_what_a_datagram_calls_a_key_is_the_same_everywhere_and_small() -> None:
    assert bucket("run/1/é") == bucket("run/1/é")
    assert {bucket("a")} == buckets(["a", "a"])
    assert len(buckets(f"k{number}" for number in range(60))) >= 59
    assert buckets(f"k{number}" for number in range(1000)) == set()
    assert all(one < schema.WATCHES for one in buckets(["", "k", "\U0010ffff"]))


async def test_a_datagram_that_names_nothing_means_anything(url: str) -> None:
    store = SqliteStore(url)
    watch = store.watch()
    await watch.follow(["a", "b"])
    assert isinstance(watch, SqliteWatch)
    for ids in (None, {schema.WATCHES}, {schema.WATCHES, 5}):
        store.file._heard(ids)
        assert await watch.receive(0.0) == {"a", "b"}
    store.file._heard({schema.WATCHES, bucket("/b"), bucket("/none")})
    assert await watch.receive(0.0) == {"b"}
    for ids in ({5}, {schema.WATCHES, bucket("/none")}):
        store.file._heard(ids)
        assert await watch.receive(0.0) == set()
    await store.close()


# -- forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_store_of_its_own_and_leaves_its_parent_alone(url: str, path: Path) -> None:
    async def in_parent() -> None:
        store = SqliteStore(url)
        watch = store.watch()
        await watch.follow(["child"])
        await store.apply([Put("parent", b"before")])
        for uses_it in (False, True):
            child = os.fork()
            if child == 0:
                os._exit(_in_child(store, uses_it))  # in a thread: this one belongs to the loop
            status = await asyncio.to_thread(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status[1]) == 0
            assert listeners(path) == 1
        assert "child" in await watch.receive(10.0)
        [entry] = await store.get(["child"])
        assert entry is not None
        assert entry.value == b"before"
        await store.apply([Put("parent", b"after", expect=1)])
        await store.close()

    asyncio.run(in_parent())


def _in_child(store: SqliteStore, uses_it: bool) -> int:
    """0 if all went well."""

    async def work() -> int:
        done: list[int | None] = [2]
        if uses_it:
            [entry] = await store.get(["parent"])
            assert entry is not None
            done = await store.apply([Put("child", entry.value, expect=ABSENT, tell=True)])
        began = time.monotonic()
        await store.close()
        return 0 if done == [2] and time.monotonic() - began < LAST_WAIT / 2 else 1

    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(work())))
    thread.start()
    thread.join(20.0)
    return found[0] if found else 2
