"""The SQLite broker keeps the contract; and what is its own: one file, several processes."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.brokers import registry
from penstock.brokers.base import Queue
from penstock.brokers.sqlite import SqliteBroker
from penstock.brokers.sqlite.broker import LOOK
from penstock.errors import BrokerRefused, ConfigError, StorageFull, Unroutable
from penstock.sqlite import schema
from penstock.sqlite.file import Transaction
from penstock.testing.conformance import Conformance, Harness
from penstock.testing.conformance.harness import System, acks, ids, message, messages
from penstock.testing.victim import killed
from tests.servers import absent

WRITER = Path(__file__).with_name("writer.py")


class TestSqlite(Conformance):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        url = f"sqlite:///{tmp_path}/queue.db"
        return Harness(connect=lambda: SqliteBroker(url), crash_consumer=killed(url))


async def refusal(path: Path | str) -> str:
    """The one line that opening a file ends with."""
    broker = SqliteBroker(f"sqlite:///{path}")
    with pytest.raises(BrokerRefused) as caught:
        await broker.open()
    with pytest.raises(BrokerRefused):  # asked again, it is refused again
        await broker.declare(Queue("work"))
    await broker.close()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


async def writer(url: str, queue: str, size: int, *count: str) -> asyncio.subprocess.Process:
    arguments = (sys.executable, str(WRITER), url, queue, str(size), *count)
    return await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)


def integrity(path: Path) -> str:
    connection = sqlite3.connect(path)
    try:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        connection.close()


# -- files that will not do


async def test_the_database_of_another_program_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE accounts (id)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    assert "something else" in await refusal(path)
    assert path.read_bytes() == before


async def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary, " * 500)
    assert "not a database" in await refusal(path)
    assert path.read_text() == "Dear diary, " * 500


async def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    broker = SqliteBroker(f"sqlite:///{path}")
    await broker.declare(Queue("work"))
    await broker.publish(messages("work", 500))
    await broker.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + b"\xde\xad" * ((len(whole) - 100) // 2))
    await refusal(path)


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert f"no directory {tmp_path / 'missing'}" in await refusal(tmp_path / "missing" / "queue.db")


async def test_a_directory_is_no_file(tmp_path: Path) -> None:
    assert "is a directory" in await refusal(tmp_path)


@pytest.mark.parametrize("version", [0, 3, 99])
async def test_another_schema_is_named_and_refused(tmp_path: Path, version: int) -> None:
    path = tmp_path / "queue.db"
    await (broker := SqliteBroker(f"sqlite:///{path}")).open()
    await broker.close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    assert f"schema {version}; this Penstock knows schema {schema.VERSION}" in await refusal(path)


async def test_an_empty_file_becomes_ours(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    path.touch()
    broker = SqliteBroker(f"sqlite:///{path}")
    await broker.declare(Queue("work"))
    await broker.close()


async def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    await (broker := SqliteBroker(f"sqlite:///{path}")).open()
    assert [oct(one.stat().st_mode & 0o077) for one in tmp_path.iterdir()] == ["0o0"] * len(list(tmp_path.iterdir()))
    await broker.close()


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_removed_while_in_use_ends_everything_with_an_error(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "queue.db"
    system = System(Harness(connect=lambda: SqliteBroker(f"sqlite:///{path}")))
    broker = await system.connect()
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 1))
    subscription = system.consume(broker, queue)
    held = await system.take(subscription)
    receiving = await system.blocked(subscription)
    path.unlink()
    if replaced:
        path.touch()
    for work in (broker.publish(messages("work", 1)), subscription.settle(acks(held)), receiving):
        with pytest.raises(BrokerRefused, match="removed or replaced"):
            await work
    await system.close()


# -- addresses


async def test_a_relative_url_is_relative_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url, path in (("sqlite:///a.db", "a.db"), ("sqlite:///sub/b.db", "sub/b.db"), ("sqlite:///c%20d.db", "c d.db")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        await (broker := registry.connect(url)).open()
        assert (tmp_path / path).is_file()
        await broker.close()


async def test_an_absolute_url_means_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/queue.db"
    assert url.startswith("sqlite:////")
    await (one := registry.connect(url)).declare(Queue("work"))
    monkeypatch.chdir("/")
    other = registry.connect(url)
    assert list(await other.publish([message("work")])) == [None]
    await one.close()
    await other.close()


async def test_two_spellings_of_a_file_are_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.db").symlink_to("queue.db")
    brokers = [SqliteBroker(f"sqlite:///{path}") for path in ("queue.db", f"{tmp_path}/queue.db", "link.db")]
    await brokers[0].declare(Queue("work"))
    for broker in brokers:
        assert list(await broker.publish([message("work")])) == [None]
    assert len({id(broker.file) for broker in brokers}) == 1
    for broker in brokers:
        await broker.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite://queue.db", "sqlite://host/queue.db"])
def test_a_url_without_a_file_is_refused_with_the_way_to_write_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"write sqlite:///relative\.db or sqlite:////absolute"):
        SqliteBroker(url)


def test_an_unknown_option_is_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"no option 'vhots' \(did you mean 'vhost'\?\)"):
        SqliteBroker("sqlite:///queue.db?vhots=red")


async def test_namespaces_of_one_file_are_kept_apart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/queue.db"
    system = System(Harness(connect=lambda: SqliteBroker(f"{url}?vhost=red")))
    red = await system.connect()
    blue, bare = SqliteBroker(url, vhost="blue"), SqliteBroker(url)
    queue = await system.declare(red, "work", topics=("news",))
    sent = await system.publish(red, messages("news", 2))
    for other in (blue, bare):
        outcomes = await other.publish([message("news"), message("work")])
        assert [type(outcome) for outcome in outcomes] == [Unroutable] * 2
        assert list(await other.admin.inspect()) == []
        await other.declare(queue)
        assert await system.silent(system.consume(other, queue))
    assert sorted(ids(await system.drain(system.consume(SqliteBroker(url, vhost="/red/"), queue)))) == sorted(sent)
    await blue.close()
    await bare.close()
    await system.close()


# -- several processes


async def test_a_publish_in_another_process_ends_the_wait_long_before_the_next_look(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/queue.db"
    system = System(Harness(connect=lambda: SqliteBroker(url)))
    broker = await system.connect()
    subscription = system.consume(broker, await system.declare(broker, "work"))
    process = await writer(url, "work", 1, "20")
    latencies = []
    assert process.stdout is not None
    while line := await process.stdout.readline():
        confirmed = time.monotonic()
        [got] = await system.take(subscription)
        latencies.append(time.monotonic() - confirmed)
        assert got.id == line.decode().strip()
        await subscription.settle(acks([got]))
    await process.communicate()
    assert len(latencies) == 20
    # Without wake-ups each would take half of LOOK on average.
    assert sorted(latencies)[10] < LOOK / 5
    await system.close()


async def test_a_lost_wake_up_costs_no_more_than_a_look_even_under_a_long_delay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/queue.db"
    system = System(Harness(connect=lambda: SqliteBroker(url)))
    broker = await system.connect()
    queue = await system.declare(broker, "work")
    await system.publish(broker, [message("work", delay=120.0)])
    subscription = system.consume(broker, queue)
    assert isinstance(broker, SqliteBroker)
    monkeypatch.setattr(broker.file.wake_up, "_heard", lambda queue_ids: None)
    receiving = await system.blocked(subscription)
    process = await writer(url, "work", 1, "1")
    stdout, _ = await process.communicate()
    assert ids(await system.woken(receiving)) == stdout.decode().split()
    await system.close()


async def test_eight_writing_processes_lose_nothing_and_see_no_lock(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/queue.db"
    system = System(Harness(connect=lambda: SqliteBroker(url)))
    broker = await system.connect()
    queue = await system.declare(broker, "work")
    processes = [await writer(url, "work", 5, "40") for _ in range(8)]
    outputs = await asyncio.gather(*(process.communicate() for process in processes))
    assert [process.returncode for process in processes] == [0] * 8
    sent = [id for stdout, _ in outputs for id in stdout.decode().split()]
    assert len(sent) == 1600
    taken = await system.take(system.consume(broker, queue), 1600)
    assert sorted(ids(taken)) == sorted(sent)
    for process in processes:  # each one's own order is kept
        own = [one.id for one in taken if one.id.startswith(f"{process.pid}-")]
        assert own == [id for id in sent if id.startswith(f"{process.pid}-")]
    await system.close()
    assert integrity(tmp_path / "queue.db") == "ok"


async def test_writers_killed_again_and_again_leave_a_whole_file_with_all_they_confirmed(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    url = f"sqlite:///{path}"
    system = System(Harness(connect=lambda: SqliteBroker(url)))
    broker = await system.connect()
    queue = await system.declare(broker, "work")
    confirmed: list[str] = []
    for kill in range(20):
        process = await writer(url, "work", 10)
        assert process.stdout is not None
        for _ in range(1 + kill % 3):  # in the middle of a later batch, at another place each time
            confirmed += (await process.stdout.readline()).decode().split()
        process.kill()
        rest, _ = await process.communicate()
        whole, _, _ = rest.decode().rpartition("\n")
        confirmed += whole.split()
    seen = ids(await system.drain(system.consume(broker, queue)))
    assert set(confirmed) <= set(seen)
    assert len(seen) == len(set(seen))
    batches: dict[str, int] = {}
    for id in seen:
        batch = id.rpartition("-")[0]
        batches[batch] = batches.get(batch, 0) + 1
    assert set(batches.values()) == {10}  # a batch is there whole or not at all
    await system.close()
    assert integrity(path) == "ok"


# -- no room


async def test_without_room_publish_says_so_and_what_was_confirmed_is_intact(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    broker = SqliteBroker(f"sqlite:///{path}")
    queue = Queue("work")
    await broker.declare(queue)
    system = System(Harness(connect=lambda: broker))

    def allow(more_pages: int) -> Callable[[Transaction], object]:
        def run(tx: Transaction) -> object:
            count = tx.execute("PRAGMA page_count").fetchone()[0]
            return tx.execute(f"PRAGMA max_page_count = {count + more_pages}").fetchone()

        return run

    await broker.run(allow(20))
    confirmed: list[str] = []
    for size in (5, 5, 200, 1):  # the 200 are too many, the one is not
        outcomes = await broker.publish(batch := messages("work", size, headers={"h": "x" * 1000}))
        if size == 200:
            assert [type(outcome) for outcome in outcomes] == [StorageFull] * 200
            assert "the disk is full" in str(outcomes[0])
        else:
            assert list(outcomes) == [None] * size
            confirmed += ids(batch)
    await broker.run(allow(1000))
    confirmed += await system.publish(broker, messages("work", 50, headers={"h": "x" * 1000}))
    assert ids(await system.drain(system.consume(broker, queue))) == confirmed
    await broker.close()
    assert integrity(path) == "ok"


async def test_one_who_finds_no_room_does_not_fail_the_others_of_its_group(tmp_path: Path) -> None:
    broker = SqliteBroker(f"sqlite:///{tmp_path}/queue.db")
    await broker.declare(Queue("work"))
    pages = await broker.run(lambda tx: tx.execute("PRAGMA page_count").fetchone()[0])
    await broker.run(lambda tx: tx.execute(f"PRAGMA max_page_count = {pages + 10}").fetchone())
    small, large, after = await asyncio.gather(
        broker.publish([message("work")]),
        broker.publish([message("work", b"x" * 100_000)]),
        broker.publish([message("work")]),
    )
    assert (list(small), [type(one) for one in large], list(after)) == ([None], [StorageFull], [None])
    await broker.close()


async def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """A file system of its own that is really full, in the WAL and under everything else SQLite writes."""
    place = tmp_path / "small"
    place.mkdir()
    ballast = place / "ballast"
    steps = (
        f"mount -t tmpfs -o size=12m small {place} || exit 77; head -c 9000000 /dev/zero > {ballast}; "
        f"exec {sys.executable} {Path(__file__).with_name('full_disk.py')} {place} {ballast}"
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
