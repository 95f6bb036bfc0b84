"""`penstock queues`, `check` and `doctor`: what they show is so, and looking changes nothing."""

from __future__ import annotations

import os
import signal
import sqlite3

import pytest

from penstock.control.queues import overview
from tests.cli.conftest import Shell
from tests.helpers import eventually_sync

KEYS = ["name", "ready", "unsettled", "consumers", "dead", "oldest_s"]


@pytest.fixture
def shell(penstock: Shell) -> Shell:
    penstock.make_queues()
    return penstock


def test_queues_have_exactly_their_keys(shell: Shell) -> None:
    (found,) = shell("queues", "--json").json
    assert list(found) == KEYS
    assert found == {"name": "orders", "ready": 0, "unsettled": 0, "consumers": 0, "dead": 0, "oldest_s": None}
    shell("publish", "orders", "1")
    (found,) = shell("queues", "list", "--json").json
    assert found["ready"] == 1
    assert 0 <= found["oldest_s"] < 60


def test_held_messages_and_consumers_are_counted(shell: Shell) -> None:
    running = shell.start("run", "jobs")
    shell("publish", "orders", '"linger"')
    eventually_sync(lambda: shell.said("lingering"))
    found = shell.queue()
    assert (found["ready"], found["unsettled"], found["consumers"]) == (0, 1, 1)
    (shell.folder / "go on").touch()
    running.send(signal.SIGTERM)
    assert running.ended() == 0


def test_table_for_people_names_the_paused(shell: Shell) -> None:
    shell("queues", "pause", "orders")
    header, line = shell("queues").out.splitlines()
    assert header.split() == ["queue", "ready", "unsettled", "consumers", "dead", "oldest"]
    assert line.split() == ["orders", "0", "0", "0", "0", "-", "paused"]


def test_paused_queue_hands_out_nothing_until_resumed(shell: Shell) -> None:
    assert shell("queues", "pause", "orders", "--json").json == {"queue": "orders", "paused": True}
    shell("publish", "orders", '"one"')
    running = shell.start("run", "jobs")
    running.until_logged("consuming orders")
    assert shell.queue()["ready"] == 1
    shell("queues", "resume", "orders")
    eventually_sync(lambda: shell.said("took") == ["one"])
    running.send(signal.SIGTERM)
    assert running.ended() == 0


def test_purge_asks_or_is_told_and_says_how_many(shell: Shell) -> None:
    shell("publish", "orders", "-", input="1\n2\n3\n")
    assert "--yes" in shell("queues", "purge", "orders", status=2).error
    assert shell.queue()["ready"] == 3
    assert shell("queues", "purge", "orders", "--yes", "--json").json == {"queue": "orders", "purged": 3}
    assert shell.queue()["ready"] == 0


@pytest.mark.parametrize("verb", ["pause", "resume", "purge"])
def test_unknown_queue_suggests_the_near_one(shell: Shell, verb: str) -> None:
    options = ["--yes"] if verb == "purge" else []
    assert "did you mean 'orders'?" in shell("queues", verb, "ordres", *options, status=1).error


async def test_lanes_fold_into_their_queue_and_orphans_stay_visible() -> None:
    from penstock.brokers import registry
    from penstock.brokers.base import Queue
    from penstock.message import Outgoing

    broker = registry.connect("memory://")
    names = ("q", "q.suspects", "q.dead", "gone.dead", "odd.dead", "odd.dead.dead", "odd.dead.suspects")
    for name in names:
        await broker.declare(Queue(name))
    await broker.publish([Outgoing(id=name, topic=name, body=b"", enqueued_at=1.0) for name in (*names, "q", "q.dead")])
    assert broker.admin is not None
    found = {one.name: (one.ready, one.dead) for one in (await overview(broker.admin)).queues}
    assert found == {"gone": (0, 1), "q": (3, 2), "odd.dead": (2, 1)}


def test_check_of_a_sound_app_is_status_0(shell: Shell) -> None:
    report = shell("check", "jobs:app", "--json").json
    assert report["problems"] == []
    assert report["stale"] == []
    assert report["routes"][0]["queues"] == ["orders"]


def test_check_names_a_paused_queue_once(shell: Shell) -> None:
    shell("queues", "pause", "orders")
    assert shell("check", "jobs", "--json").json["notes"] == ["queue 'orders' is paused"]


def test_check_finds_stale_bindings(shell: Shell) -> None:
    text = (shell.folder / "jobs.py").read_text()
    (shell.folder / "jobs.py").write_text(text.replace('topics=["all"]', 'topics=["every"]'))
    result = shell("check", "jobs", "--json", status=1)
    assert result.json["stale"] == [{"queue": "orders", "topic": "all"}]
    assert "'orders' is still bound to 'all'" in shell("check", "jobs", status=1).out
    assert shell("check", "jobs", "--json", status=1).json["stale"], "looking has changed the bindings"


def test_check_tells_a_broker_that_refuses(penstock: Shell) -> None:
    jobs = penstock.folder / "jobs.py"
    jobs.write_text(
        jobs.read_text().replace('App("sqlite:///q.db"', 'App("sqlite:///q.db", dead_letters="sqlite:///d.db"')
    )
    (penstock.folder / "d.db").write_text("no database" * 500)
    (problem,) = penstock("check", "jobs", "--json", status=1).json["problems"]
    assert "d.db" in problem


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("", "nothing", "no module 'nothing'"),
        ("", "jbos", "did you mean 'jobs'?"),
        ("", "jobs:ap", "did you mean 'app'?"),
        ("", "jobs:say", "is a function, not an App (did you mean 'app'?)"),
        ("", "jobs.py", "write jobs:app"),
        ("import nothing_here", "broken", "broken.py:1: ModuleNotFoundError"),
        ("def f(:\n", "broken", "broken.py:1: SyntaxError"),
        ("\ndef f():\n    return 1 / 0\nf()", "broken", "broken.py:3: ZeroDivisionError"),
        ("import sys\nsys.exit(3)", "broken", "broken.py:2: SystemExit"),
        ("from penstock import App\napp = App('rabit://x')", "broken", "broken.py:2: ConfigError"),
        ("from penstock import App\napp = App()\napp.run()", "broken", "under `if __name__ == '__main__':`"),
        ("from penstock import App\napp = App()\n@app.route\ndef f(m): ...", "broken", "write @app.route('…') above f"),
        ("from penstock import App\napp = App()", "broken", None),
    ],
)
def test_bad_module_is_one_line(penstock: Shell, source: str, target: str, said: str | None) -> None:
    (penstock.folder / "broken.py").write_text(source)
    result = penstock("check", target, status=1)
    if said is None:
        assert "declares no route" in result.out
        return
    assert said in result.error
    assert said in penstock("run", target, status=1).error
    assert said in penstock("run", target, "--processes", "2", "--log-level", "error", status=1).error


def test_doctor_tells_what_it_sees(shell: Shell) -> None:
    found = {one["what"]: one for one in shell("doctor", "--json").json}
    old = sqlite3.sqlite_version_info < (3, 51, 3)
    assert found["sqlite"]["health"] == ("warning" if old else "ok")
    assert found["integrity"]["health"] == found["broker"]["health"] == "ok"
    assert "max_lease" in found["capabilities"]["detail"]
    assert {"python", "uvloop", "disk", "file", "configuration"} <= set(found)
    assert "sqlite" in shell("doctor").out


def test_doctor_finds_a_damaged_page(shell: Shell) -> None:
    shell("publish", "orders", "-", input='"' + "x" * 5000 + '"\n' + "1\n" * 2000)
    with sqlite3.connect("q.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    size = os.path.getsize("q.db")
    with open("q.db", "r+b") as file:
        file.seek(size // 2 // 4096 * 4096)
        file.write(b"\xa5" * 8192)
    found = {one["what"]: one for one in shell("doctor", "--json", status=1).json}
    assert found["integrity"]["health"] == "failed"


def test_doctor_finds_a_foreign_file(penstock: Shell) -> None:
    connection = sqlite3.connect("q.db")
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    found = {one["what"]: one for one in penstock("doctor", "--json", status=1).json}
    assert found["broker"]["health"] == "failed"
    assert "something else" in found["broker"]["detail"]
