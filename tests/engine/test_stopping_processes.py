"""Whatever a run does in a process of its own, it is stopped at its limit, and the next one is served."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from penstock import App, Client, context
from penstock.context import current_headers, current_progress
from penstock.delivery.stopping import Overrun, ProcessDied, ProcessRunner, RemoteFailure
from penstock.errors import RemoteError, Unavailable, Unencodable, Unroutable
from tests.engine import stopping_targets as targets
from tests.helpers import eventually

pytestmark = pytest.mark.blocks


@pytest.fixture
async def in_process() -> AsyncIterator[Callable[..., ProcessRunner]]:
    runners: list[ProcessRunner] = []
    current_headers.set({})

    def make(function: Callable[..., Any], slots: int = 1, **settings: Any) -> ProcessRunner:
        runners.append(ProcessRunner(function, slots, "test", lambda: settings))
        return runners[-1]

    yield make
    for runner in runners:
        await runner.close()


async def test_a_process_runs_what_can_be_imported(in_process: Callable[..., ProcessRunner]) -> None:
    runner = in_process(targets.add)
    assert await runner.run((1,), {"y": 2}, 30) == 3
    assert await in_process(targets.later).run(("x",), {}, 30) == "later x"
    pid = await in_process(targets.pid).run((), {}, 30)
    assert pid != os.getpid()


async def test_a_process_is_kept_for_the_next_run(in_process: Callable[..., ProcessRunner]) -> None:
    runner = in_process(targets.pid)
    assert len({await runner.run((), {}, 30) for _ in range(3)}) == 1


async def test_a_function_within_another_is_forked(in_process: Callable[..., ProcessRunner]) -> None:
    secret = "only here"

    def tell(more: str) -> tuple[str, int]:
        return secret + more, os.getpid()

    text, pid = await in_process(tell).run(("!",), {}, 30)
    assert text == "only here!"
    assert pid != os.getpid()


@pytest.mark.parametrize("function", [targets.spin, targets.sleep])
async def test_a_hung_process_is_killed_and_the_next_run_served(
    in_process: Callable[..., ProcessRunner], function: Callable[..., Any]
) -> None:
    runner = in_process(function)
    first = await runner.run((False,), {}, 30)
    with pytest.raises(Overrun):
        await runner.run((True,), {}, 0.3)
    second = await runner.run((False,), {}, 30)
    assert first != second  # process ids
    await eventually(lambda: not _alive(first))


async def test_cancelling_kills_the_process(in_process: Callable[..., ProcessRunner]) -> None:
    runner = in_process(targets.spin)
    pid = await runner.run((False,), {}, 30)
    running = asyncio.create_task(runner.run((True,), {}, None))
    await asyncio.sleep(0.1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await eventually(lambda: not _alive(pid))


async def test_errors_of_a_process_come_out_as_data(in_process: Callable[..., ProcessRunner]) -> None:
    runner = in_process(targets.fail)
    with pytest.raises(RemoteFailure) as caught:
        await runner.run(("no",), {}, 30)
    assert (caught.value.type, caught.value.message) == ("Custom", "no")
    assert "in fail" in (caught.value.traceback or "")
    with pytest.raises(RemoteFailure, match="no JSON form"):
        await in_process(targets.unsayable).run((), {}, 30)
    with pytest.raises(Unencodable):
        await runner.run((object(),), {}, 30)


async def test_a_process_that_dies_is_told_and_replaced(in_process: Callable[..., ProcessRunner]) -> None:
    runner = in_process(targets.die)
    for how, fate in (("exit", "status 9"), ("kill", "SIGKILL")):
        with pytest.raises(ProcessDied, match=fate):
            await runner.run((how,), {}, 30)
        assert await runner.run(("live",), {}, 30) == "live"


async def test_headers_and_progress_come_from_a_process(in_process: Callable[..., ProcessRunner]) -> None:
    headers: dict[str, Any] = {}
    progress: list[tuple[float, float]] = []
    current_headers.set(headers)
    current_progress.set(lambda done, total: progress.append((done, total)))
    assert await in_process(targets.talk).run((), {}, 30) == "said"
    assert headers == {"from": "child"}
    assert progress == [(1, 3), (2, 3)]


async def test_large_arguments_and_results_pass(in_process: Callable[..., ProcessRunner]) -> None:
    text = "x" * 3_000_000
    assert await in_process(targets.echo).run((text,), {}, 60) == text


async def test_a_copy_of_the_process_gives_no_answer(in_process: Callable[..., ProcessRunner]) -> None:
    runner = in_process(targets.fork_and_forget)
    for n in range(5):
        assert await runner.run((n,), {}, 30) == n


async def test_an_answer_to_another_call_is_none(in_process: Callable[..., ProcessRunner]) -> None:
    runner = in_process(targets.forge)
    first = await runner.run((None,), {}, 30)
    with pytest.raises(ProcessDied, match="another call"):
        await runner.run((1,), {}, 30)
    assert await runner.run((None,), {}, 30) != first
    await eventually(lambda: not _alive(first))


async def test_progress_that_comes_after_its_call_counts_no_more(in_process: Callable[..., ProcessRunner]) -> None:
    progress: list[tuple[float, float]] = []
    current_progress.set(lambda done, total: progress.append((done, total)))
    runner = in_process(targets.tell_for_ever)
    for n in range(3):
        progress.clear()
        await runner.run((n,), {}, 30)
        assert {done for done, _ in progress} <= {n}


async def test_progress_that_is_no_number_is_the_functions_failure(in_process: Callable[..., ProcessRunner]) -> None:
    progress: list[tuple[float, float]] = []
    current_progress.set(lambda done, total: progress.append((done, total)))
    assert await in_process(targets.misreport).run((), {}, 30) == [
        "ValueError",
        "TypeError",
        "ValueError",
        "ValueError",
    ]
    assert progress == []


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_child_that_died_idle_fails_nobody(in_process: Callable[..., ProcessRunner], noticed: bool) -> None:
    runner = in_process(targets.pid)
    for _ in range(3):
        pid = await runner.run((), {}, 30)
        os.kill(pid, signal.SIGKILL)
        if noticed:
            await eventually(functools.partial(_gone, pid))
        assert await runner.run((), {}, 30) != pid


async def test_a_child_that_dies_before_it_begins_fails_nobody(in_process: Callable[..., ProcessRunner]) -> None:
    runner = in_process(targets.pid)
    pid = await runner.run((), {}, 30)
    os.kill(pid, signal.SIGSTOP)
    running = asyncio.create_task(runner.run((), {}, 30))
    await asyncio.sleep(0.1)  # it has the call, and cannot begin
    os.kill(pid, signal.SIGKILL)
    assert await running != pid


async def test_a_fresh_child_that_cannot_live_is_told(
    in_process: Callable[..., ProcessRunner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lethal.py").write_text("import os\nif 'DIE' in os.environ: os._exit(7)\ndef work(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    import lethal  # type: ignore[import-not-found]

    monkeypatch.setenv("DIE", "1")
    with pytest.raises(ProcessDied, match="status 7"):
        await in_process(lethal.work).run((), {}, 30)


async def test_what_a_function_started_ends_with_it(in_process: Callable[..., ProcessRunner], tmp_path: Path) -> None:
    def forked(path: str) -> None:
        targets.run_tool(path)

    for n, function in enumerate((targets.run_tool, forked)):
        path = tmp_path / str(n)
        running = asyncio.create_task(in_process(function).run((str(path),), {}, None))
        pid = await asyncio.to_thread(_read_pid, path)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await eventually(functools.partial(_dead, pid))


@pytest.mark.parametrize("how", ["fork", "multiprocessing", "exit"])
async def test_what_a_function_started_ends_when_its_process_dies(
    in_process: Callable[..., ProcessRunner], tmp_path: Path, how: str
) -> None:
    with pytest.raises(ProcessDied):
        await asyncio.wait_for(in_process(targets.fork_and_die).run((how, str(tmp_path / "pid")), {}, None), 20)
    pid = _read_pid(tmp_path / "pid")
    await eventually(lambda: not _alive(pid))


async def test_a_run_ends_with_its_process_whoever_holds_the_line(
    in_process: Callable[..., ProcessRunner], tmp_path: Path
) -> None:
    """A copy that C has made, in a session of its own, is out of our reach."""
    runner = in_process(targets.fork_in_c_and_die)
    try:
        with pytest.raises(ProcessDied, match="SIGKILL"):
            await asyncio.wait_for(runner.run((str(tmp_path / "pid"),), {}, None), 20)
    finally:
        os.kill(_read_pid(tmp_path / "pid"), signal.SIGKILL)


async def test_the_end_of_a_fork_is_seen_where_the_system_does_not_tell(
    in_process: Callable[..., ProcessRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)

    def forked(how: str) -> str:
        return targets.die(how)

    runner = in_process(forked)
    assert await runner.run(("live",), {}, 30) == "live"
    with pytest.raises(ProcessDied, match="status 9"):
        await runner.run(("exit",), {}, 30)
    assert await runner.run(("live",), {}, 30) == "live"


async def test_an_outage_comes_out_as_itself(in_process: Callable[..., ProcessRunner]) -> None:
    runner = in_process(targets.be_away)
    pid = await runner.run((False,), {}, 30)
    with pytest.raises(Unavailable, match="the sink"):
        await runner.run((True,), {}, 30)
    assert await runner.run((False,), {}, 30) == pid


async def test_an_outage_costs_no_attempt(tmp_path: Path) -> None:
    app = App(f"memory://{tmp_path.name}")

    @app.task(isolation="process", retries=0)
    def deliver(path: str) -> str:
        if not Path(path).exists():
            Path(path).touch()
            raise Unavailable("the sink is away")
        return "delivered"

    async with app:
        assert await (await deliver.send(str(tmp_path / "tried"))).result(30) == "delivered"


async def test_long_errors_are_cut(in_process: Callable[..., ProcessRunner]) -> None:
    with pytest.raises(RemoteFailure) as caught:
        await in_process(targets.fail_at_length).run((), {}, 30)
    assert len(caught.value.message) == 4000
    assert len(caught.value.traceback or "") == 6000


async def test_settings_without_a_json_form_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = App(f"memory://{tmp_path.name}", settings={"lock": threading.Lock(), "size": 3})

    @app.task(isolation="process", concurrency=2)
    def tell() -> list[Any]:
        time.sleep(0.2)
        return [context.settings.size, "lock" in context.settings]

    caplog.set_level(logging.WARNING, "penstock.stopping")
    async with app:
        assert await asyncio.gather(*(tell.call() for _ in range(2))) == [[3, False]] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "tell: its processes have no settings lock: JSON cannot say them"
    ]


async def test_a_module_sees_its_parents_arguments(
    in_process: Callable[..., ProcessRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--flag", "\udc80"])
    argv, ours = await in_process(targets.arguments).run((), {}, 30)
    assert argv == ["program", "--flag", "'\\udc80'"]
    assert ours == []


async def test_a_script_that_runs_whenever_it_is_imported_says_so(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'q.db'}"
    script = tmp_path / "bare.py"
    script.write_text(
        f"from penstock import App\n"
        f"app = App({url!r})\n"
        f"@app.task(isolation='process')\n"
        f"def job(x): return x\n"
        f"app.run()\n"
    )
    worker = subprocess.Popen([sys.executable, str(script)])
    try:
        async with Client(url) as client:
            with pytest.raises(RemoteError, match="__main__") as caught:
                await _call_once_there(client, "job", 1)
        assert caught.value.type == "ConfigError"
    finally:
        worker.terminate()
        worker.wait()


def test_no_child_outlives_its_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from penstock.delivery.stopping import ProcessRunner\n"
        "from tests.engine import stopping_targets as targets\n"
        "async def main():\n"
        "    def local(path):\n"
        "        targets.note_and_spin(path)\n"
        "    all = (targets.note_and_spin, local, *targets.unstoppable)\n"
        "    runs = [ProcessRunner(one, 1, 'x', dict) for one in all]\n"
        "    await asyncio.gather(*(run.run((sys.argv[1] + str(n),), {}, None) for n, run in enumerate(runs)))\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "pid")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        pids = [_read_pid(tmp_path / f"pid{n}") for n in range(2 + len(targets.unstoppable))]
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    until = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < until, f"{pids} live on"
        time.sleep(0.02)


async def _call_once_there(client: Client, name: str, body: Any) -> Any:
    while True:
        try:
            return await client.call(name, body, timeout=20)
        except Unroutable:
            await asyncio.sleep(0.05)


def _read_pid(path: Path) -> int:
    until = time.monotonic() + 30
    while not path.exists() or not path.read_text().endswith("\n"):
        assert time.monotonic() < until, f"nobody wrote {path}"
        time.sleep(0.02)
    return int(path.read_text())


def _gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def _dead(pid: int) -> bool:
    return not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
