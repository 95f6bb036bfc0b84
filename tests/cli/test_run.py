"""`penstock run`: one process or several, whatever is done to them, nothing is lost and all end."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path

import pytest

from tests.cli.conftest import Running, Shell, alive, children
from tests.helpers import eventually_sync

TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL


def pid_of(shell: Shell, word: str) -> int:
    """The process of the handler that said so last."""
    return int(eventually_sync(lambda: shell.said(word))[-1])


def handlers_of(running: Running, count: int) -> list[int]:
    """The processes below a supervisor, once they all consume."""
    running.until_logged("consuming orders", count)
    return children(running.process.pid)


@pytest.mark.parametrize("options", [[], ["--processes", "1"], ["--processes", "2"]])
@pytest.mark.parametrize(("number", "status"), [(TERM, 0), (INT, 130)])
def test_first_signal_finishes_what_runs(penstock: Shell, options: list[str], number: int, status: int) -> None:
    penstock.make_queues()
    penstock("publish", "orders", '"linger"')
    running = penstock.start("run", "jobs", *options)
    pid_of(penstock, "lingering")
    running.send(number)
    running.until_logged("finishing what runs" if not options else "finish what they run")
    (penstock.folder / "go on").touch()
    assert running.ended() == status
    assert penstock.said("took") == ["linger"]
    assert penstock.queue()["unsettled"] == penstock.queue()["ready"] == 0


@pytest.mark.parametrize("options", [[], ["--processes", "1"]])
def test_second_signal_cancels_and_releases(penstock: Shell, options: list[str]) -> None:
    penstock.make_queues()
    penstock("publish", "orders", '"stay"')
    running = penstock.start("run", "jobs", *options)
    pid = pid_of(penstock, "staying")
    running.send(TERM)
    running.until_logged("finishing what runs")
    running.send(TERM)
    assert running.ended() == 0
    assert not alive(pid)
    found = penstock.queue()
    assert (found["ready"], found["unsettled"]) == (1, 0), "released at once, not left to its lease"
    with sqlite3.connect("q.db") as connection:
        assert connection.execute("SELECT redelivered FROM messages").fetchall() == [(0,)]
    connection.close()


def test_signal_to_the_whole_group_is_one_request(penstock: Shell) -> None:
    """As service managers do it: the supervisor and each process get it, and the supervisor passes it on."""
    penstock.make_queues()
    penstock("publish", "orders", '"linger"')
    running = penstock.start("run", "jobs", "--processes", "2")
    pid_of(penstock, "lingering")
    for pid in (*handlers_of(running, 2), running.process.pid):
        os.kill(pid, TERM)
    running.until_logged("finish what they run")
    (penstock.folder / "go on").touch()
    assert running.ended() == 0
    assert penstock.said("took") == ["linger"]


def test_handler_that_never_ends_is_left_by_the_third_signal(penstock: Shell) -> None:
    jobs = penstock.folder / "jobs.py"
    deaf = "while True:\n            try: await asyncio.sleep(1000)\n            except asyncio.CancelledError: pass"
    jobs.write_text(jobs.read_text().replace("await asyncio.sleep(1000)", deaf))
    penstock.make_queues()
    penstock("publish", "orders", '"stay"')
    running = penstock.start("run", "jobs")
    pid_of(penstock, "staying")
    for said in ("finishing what runs", "cancelling what runs", "leaving at once"):
        running.send(TERM)
        running.until_logged(said)
    assert running.ended() == 1


@pytest.mark.parametrize(
    "stuck",
    [
        "while True:\n            try: await asyncio.sleep(1000)\n            except asyncio.CancelledError: pass",
        "await asyncio.to_thread(time.sleep, 1000)",
    ],
)
def test_handler_that_never_ends_does_not_outlast_the_grace(penstock: Shell, stuck: str) -> None:
    jobs = penstock.folder / "jobs.py"
    jobs.write_text(jobs.read_text().replace("await asyncio.sleep(1000)", stuck).replace("grace=20", "grace=0.2"))
    penstock.make_queues()
    penstock("publish", "orders", '"stay"')
    running = penstock.start("run", "jobs")
    pid_of(penstock, "staying")
    running.send(TERM)
    assert running.ended() == 1
    assert "did not end" in running.log
    assert penstock.queue()["ready"] == 1


def test_signal_while_the_broker_cannot_be_reached_ends_the_start(penstock: Shell) -> None:
    penstock.make_queues()
    locked = sqlite3.connect("q.db", isolation_level=None)
    jobs = penstock.folder / "jobs.py"
    source = "from penstock.sqlite import file\nfile.BUSY_TIMEOUT = 0.05\n" + jobs.read_text()
    jobs.write_text(source)
    locked.execute("BEGIN IMMEDIATE")
    running = penstock.start("run", "jobs")
    running.until_logged("not reachable", 2)
    running.send(TERM)
    assert running.ended() == 0
    again = penstock.start("run", "jobs")
    again.until_logged("not reachable")
    locked.execute("ROLLBACK")
    locked.close()
    again.until_logged("consuming orders")
    again.send(INT)
    assert again.ended() == 130


@pytest.mark.parametrize("options", [[], ["--processes", "3"]])
def test_refusal_ends_the_start_with_one_line(penstock: Shell, options: list[str]) -> None:
    Path("q.db").write_text("not a database, but of some length" * 100)
    error = penstock("run", "jobs", "--log-level", "error", *options, status=1).error
    assert "q.db" in error


@pytest.mark.parametrize("options", [[], ["--processes", "2"]])
def test_failing_startup_hook_ends_the_start(penstock: Shell, options: list[str]) -> None:
    jobs = penstock.folder / "jobs.py"
    jobs.write_text(jobs.read_text() + "\n@app.on_startup\ndef connect():\n    raise OSError('no store')\n")
    running = penstock.start("run", "jobs", *options)
    assert running.ended() == 1
    assert "error: the start failed: OSError: no store" in running.log


def test_logs_as_json_are_one_object_a_line(penstock: Shell) -> None:
    import json

    running = penstock.start("run", "jobs", "--log-format", "json")
    running.until_logged("consuming orders")
    running.send(TERM)
    assert running.ended() == 0
    assert {"time", "level", "logger", "message"} <= set(json.loads(running.log.splitlines()[0]))


def test_killed_process_is_replaced_and_its_message_comes_again(penstock: Shell) -> None:
    penstock.make_queues()
    running = penstock.start("run", "jobs", "--processes", "2")
    before = handlers_of(running, 2)
    penstock("publish", "orders", '"linger"')
    victim = pid_of(penstock, "lingering")
    assert victim in before
    os.kill(victim, KILL)
    running.until_logged("was killed by SIGKILL")
    after = handlers_of(running, 3)
    assert len(after) == 2
    assert victim not in after
    (penstock.folder / "go on").touch()
    eventually_sync(lambda: penstock.said("took") == ["linger"], running.log)
    running.send(TERM)
    assert running.ended() == 0


def test_process_that_exits_by_itself_is_replaced(penstock: Shell) -> None:
    penstock.make_queues()
    running = penstock.start("run", "jobs", "--processes", "1")
    penstock("publish", "orders", '"exit"')
    running.until_logged("ended with status 1; starting another")
    running.until_logged("consuming orders", 2)
    running.send(TERM)
    assert running.ended() == 0


def test_poison_ends_among_the_dead_letters_and_the_rest_is_done(penstock: Shell) -> None:
    penstock.make_queues()
    penstock("publish", "orders", "-", input='"die"\n' + "\n".join(str(n) for n in range(20)))
    running = penstock.start("run", "jobs", "--processes", "1")
    eventually_sync(lambda: penstock.queue()["dead"] == 1, running.log, within=60)
    eventually_sync(lambda: len(penstock.said("took")) == 20, running.log)
    (letter,) = penstock("dead", "list", "orders", "--json").json
    assert letter["reason"] == "crashed"
    running.send(TERM)
    assert running.ended() == 0


def test_death_of_the_supervisor_drains_its_processes(penstock: Shell) -> None:
    penstock.make_queues()
    running = penstock.start("run", "jobs", "--processes", "2")
    penstock("publish", "orders", '"linger"')
    pid_of(penstock, "lingering")
    below = handlers_of(running, 2)
    running.send(KILL)
    running.ended()
    running.until_logged("the supervisor: finishing what runs", 2)
    (penstock.folder / "go on").touch()
    eventually_sync(lambda: not any(map(alive, below)), running.log)
    assert penstock.said("took") == ["linger"]
    assert penstock.queue()["unsettled"] == 0


def test_third_signal_kills_processes_that_do_not_listen(penstock: Shell) -> None:
    jobs = penstock.folder / "jobs.py"
    jobs.write_text(jobs.read_text().replace("await asyncio.sleep(1000)", "time.sleep(1000)"))
    penstock.make_queues()
    penstock("publish", "orders", '"stay"')
    running = penstock.start("run", "jobs", "--processes", "1")
    pid = pid_of(penstock, "staying")
    for number, said in ((TERM, "finish what they run"), (INT, "cancel what they run"), (TERM, "killing")):
        running.send(number)
        running.until_logged(said)
    assert running.ended() == 1
    eventually_sync(lambda: not alive(pid))


def test_reload_picks_a_change_up_and_drains_first(penstock: Shell) -> None:
    penstock.make_queues()
    running = penstock.start("run", "jobs", "--reload")
    penstock("publish", "orders", '"linger"')
    old = pid_of(penstock, "lingering")
    jobs = penstock.folder / "jobs.py"
    jobs.write_text(jobs.read_text().replace('say("took"', 'say("new"'))
    running.until_logged("jobs.py changed")
    assert alive(old)
    (penstock.folder / "go on").touch()
    running.until_logged("consuming orders", 2)
    assert penstock.said("took") == ["linger"]
    penstock("publish", "orders", '"after"')
    eventually_sync(lambda: penstock.said("new") == ["after"], running.log)
    running.send(INT)
    assert running.ended() == 130


def test_reload_survives_a_broken_change(penstock: Shell) -> None:
    running = penstock.start("run", "jobs", "--reload")
    running.until_logged("consuming orders")
    jobs = penstock.folder / "jobs.py"
    good = jobs.read_text()
    jobs.write_text("def broken(:\n")
    running.until_logged("jobs.py:1: SyntaxError")
    running.until_logged("waiting for a change")
    jobs.write_text(good)
    running.until_logged("consuming orders", 2)
    running.send(TERM)
    assert running.ended() == 0


def test_reload_without_watchfiles_says_what_to_install(penstock: Shell) -> None:
    (penstock.folder / "watchfiles.py").write_text("raise ImportError('none')\n")
    assert "pip install 'penstock[reload]'" in penstock("run", "jobs", "--reload", status=1).error
