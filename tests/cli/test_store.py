"""Where results are kept: `--store` beats everything, wherever it must be known; `check` and `doctor` look at it."""

from __future__ import annotations

import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from penstock import App, ConfigError, StoreRequired, running
from tests.cli.conftest import Shell
from tests.helpers import eventually_sync

SCHEDULED = """
import asyncio
from penstock import App

app = App(GIVEN, lease=2, grace=5)


@app.task(topics=["hello"])
async def greet(name):
    return f"hello {name}"


@app.every(0.2)
async def tick():
    with open("said", "a") as file:
        print("tick", file=file)


@app.cron("0 3 * * *", timezone="Asia/Tokyo")
async def nightly(): ...


if __name__ == "__main__":
    app.run()
"""
AWAY = "amqp://127.0.0.1:1/"


def write(shell: Shell, given: str = "") -> None:
    (shell.folder / "jobs.py").write_text(SCHEDULED.replace("GIVEN, ", f"{given}, " if given else ""))


@pytest.mark.parametrize("options", [[], ["--processes", "2"]])
@pytest.mark.parametrize("given", ["", "'sqlite:///q.db', store='sqlite:///given.db'"])
def test_flag_counts_in_every_process_and_over_what_the_app_says(
    penstock: Shell, options: list[str], given: str
) -> None:
    write(penstock, given)
    flag = ["--store", "sqlite:///flag.db"]
    started = penstock.start("run", "jobs", *flag, *options, PENSTOCK_STORE="sqlite:///environment.db")
    eventually_sync(lambda: "tick" in said(penstock), started.log)
    started.send(signal.SIGTERM)
    assert started.ended() == 0
    assert sorted(path.name for path in penstock.folder.glob("*.db")) == ["flag.db", "q.db"]
    topics = {one["topic"] for one in penstock("tasks", "list", "--json", *flag).json}
    assert topics == {"tick"}


def said(shell: Shell) -> str:
    path = shell.folder / "said"
    return path.read_text() if path.exists() else ""


def test_flag_counts_before_the_module_is_imported(penstock: Shell) -> None:
    write(penstock)
    error = penstock("check", "jobs", "--broker", AWAY, status=1, PENSTOCK_BROKER=AWAY).error
    assert "jobs.py:13: StoreRequired: every needs a store" in error
    result = penstock("check", "jobs", "--store", "sqlite:///t.db", "--json", status=1, PENSTOCK_BROKER=AWAY)
    assert [one["task"] for one in result.json["schedules"]] == ["tick", "nightly"]


def test_flag_beats_environment_beats_file_beats_the_brokers_own(penstock: Shell) -> None:
    penstock.make_queues()
    for name in ("flag.db", "environment.db", "file.db"):
        Path(name).touch()
    Path("penstock.toml").write_text('store = "sqlite:///file.db"\n')
    penstock.environment["PENSTOCK_STORE"] = "sqlite:///environment.db"
    stores = [penstock("send", "somewhere", "--store", "sqlite:///flag.db").out.strip()]
    stores.append(penstock("send", "somewhere").out.strip())
    del penstock.environment["PENSTOCK_STORE"]
    stores.append(penstock("send", "somewhere").out.strip())
    Path("penstock.toml").unlink()
    stores.append(penstock("send", "somewhere").out.strip())
    for name, taskid in zip(("flag.db", "environment.db", "file.db", "q.db"), stores, strict=True):
        assert [one["taskid"] for one in penstock("tasks", "--json", "--store", f"sqlite:///{name}").json] == [taskid]


def test_a_bad_store_is_one_line(penstock: Shell) -> None:
    penstock.make_queues()
    for command in (["tasks"], ["send", "x"], ["check", "jobs"], ["run", "jobs"], ["doctor"]):
        assert "did you mean 'sqlite'?" in penstock(*command, "--store", "sqlit:///x.db", status=2).error


def test_a_script_takes_the_flag_too(penstock: Shell) -> None:
    write(penstock)
    command = [sys.executable, "jobs.py", "--store", "sqlite:///flag.db"]
    process = subprocess.Popen(command, env=penstock.environment, stderr=subprocess.PIPE)
    eventually_sync(lambda: "tick" in said(penstock))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert penstock("tasks", "list", "--json", "--store", "sqlite:///flag.db").json


def test_another_broker_may_take_the_store_away() -> None:
    app = App("memory://")

    @app.every(60)
    async def collect() -> None: ...

    with pytest.raises(StoreRequired, match="the schedule of 'collect' needs a store"):
        running.point(app, AWAY, None, None)
    running.point(app, AWAY, None, None, "memory://somewhere")
    assert app.store == "memory://somewhere"
    with pytest.raises(ConfigError):
        running.point(app, None, None, None, "nonsense://")


# -- check and doctor


def test_check_shows_tasks_and_when_schedules_are_due(penstock: Shell) -> None:
    write(penstock)
    found = penstock("check", "jobs", "--json").json
    assert (found["routes"], found["store"], found["problems"]) == ([], "sqlite:///q.db", [])
    assert found["tasks"][0] == {
        "name": "greet", "handler": "greet", "topics": ["hello"], "broker": "sqlite:///q.db"
    }  # fmt: skip
    tick, nightly = found["schedules"]
    assert tick["definition"] == "every 0.2 s"
    due = datetime.fromisoformat(nightly["next"])
    assert (due.astimezone().utctimetuple().tm_hour, due.minute) == (18, 0)
    lines = penstock("check", "jobs").out.splitlines()
    assert "task     greet: greet, bound to hello on sqlite:///q.db" in lines
    assert f"schedule nightly: cron '0 3 * * *' in Asia/Tokyo, next {nightly['next']}" in lines
    assert "store    sqlite:///q.db" in lines
    assert not (penstock.folder / "q.db").exists()


def test_check_tells_of_stale_topics_and_of_a_store_that_cannot_be_reached(penstock: Shell) -> None:
    write(penstock)
    started = penstock.start("run", "jobs")
    started.until_logged("consuming greet")
    started.send(signal.SIGTERM)
    started.ended()
    assert penstock("check", "jobs").out.endswith("all is well\n")
    jobs = penstock.folder / "jobs.py"
    jobs.write_text(jobs.read_text().replace('topics=["hello"]', 'topics=["hi"]'))
    assert penstock("check", "jobs", "--json", status=1).json["stale"] == [{"queue": "greet", "topic": "hello"}]
    Path("bad.db").write_bytes(b"this is no database at all, whatever it is" * 200)
    (problem,) = penstock("check", "jobs", "--json", "--store", "sqlite:///bad.db", status=1).json["problems"]
    assert problem.startswith("the store, sqlite:///bad.db: ")


def test_doctor_looks_at_the_store(penstock: Shell) -> None:
    def health(*options: str, status: int = 0) -> dict[str, str]:
        found = penstock("doctor", "--json", *options, status=status).json
        return {one["what"]: f"{one['health']}: {one['detail']}" for one in found}

    assert health()["store"].startswith("note: ")
    assert not (penstock.folder / "q.db").exists()
    penstock.make_queues()
    assert health()["store"].startswith("ok: sqlite:///q.db can be reached")
    assert "does not exist yet" in health("--store", "sqlite:///tasks.db")["store"]
    Path("bad.db").write_bytes(b"this is no database at all, whatever it is" * 200)
    assert health("--store", "sqlite:///bad.db", status=1)["store"].startswith("failed: sqlite:///bad.db: ")
    assert health("--broker", AWAY, status=1)["store"].startswith("note: none")
