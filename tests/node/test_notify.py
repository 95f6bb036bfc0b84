"""What systemd is told, and when."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from penstock.cli.serve import _Served
from penstock.node.notify import Notify
from tests.helpers import PATIENCE, eventually

STUCK = """\
name: stuck
mode: single
script: |-
  async def stuck():
      import time
      await asyncio.sleep(0.5)
      open("stuck", "w").close()
      time.sleep(3)
      open("free", "w").close()
      await asyncio.sleep(60)
"""


class Manager:
    """The service manager's end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1))
        self._socket.setblocking(False)
        self.heard: list[str] = []

    def hear(self) -> list[str]:
        """All that was said up to now."""
        while True:
            try:
                self.heard.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return self.heard

    def wait_for(self, text: str) -> None:
        """Blocks."""
        self._socket.settimeout(PATIENCE)
        while text not in self.heard:
            self.heard.append(self._socket.recv(4096).decode())
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("abstract names are Linux's")
    made = Manager(f"@penstock-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify"))
    yield made
    made.close()


async def test_ready_then_stopping(manager: Manager) -> None:
    async with Notify({"NOTIFY_SOCKET": manager.address}) as notify:
        assert manager.hear() == []
        notify.ready()
        assert manager.hear() == ["READY=1"]
        notify.stopping()
        assert manager.hear() == ["READY=1", "STOPPING=1"]
    notify.ready()
    assert len(manager.hear()) == 2, "after its end it says nothing"


@pytest.mark.blocks
async def test_the_watchdog_hears_of_a_loop_that_turns_and_nothing_of_one_that_does_not(manager: Manager) -> None:
    within = 0.3
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "300000", "WATCHDOG_PID": str(os.getpid())}
    async with Notify(environ):
        await eventually(lambda: len(manager.hear()) >= 4)
        assert set(manager.heard) == {"WATCHDOG=1"}
        before = len(manager.heard)
        time.sleep(2 * within)
        assert len(manager.hear()) == before, "the loop is held up"
        await eventually(lambda: len(manager.hear()) > before)


@pytest.mark.parametrize(
    "environ",
    [{}, {"WATCHDOG_USEC": "30000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}],
    ids=["none is wanted", "another process is meant", "no number", "none"],
)
async def test_a_watchdog_that_is_not_ours_hears_nothing(manager: Manager, environ: dict[str, str]) -> None:
    async with Notify({"NOTIFY_SOCKET": manager.address, **environ}) as notify:
        await asyncio.sleep(0.1)  # what is not said cannot be waited for
        notify.ready()
        assert manager.hear() == ["READY=1"]


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "/nowhere/notify", "@nobody-is-here", "relative"])
async def test_a_manager_that_is_not_there_changes_nothing(address: str) -> None:
    async with Notify({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000"}) as notify:
        notify.ready()
        notify.stopping()


@pytest.mark.parametrize("worn_out", [False, True])
async def test_a_node_that_starts_itself_again_does_not_say_that_it_ends(manager: Manager, worn_out: bool) -> None:
    life = SimpleNamespace(worn_out=asyncio.Event())
    if worn_out:
        life.worn_out.set()
    served = _Served(cast(Any, SimpleNamespace(_life=life)), "127.0.0.1", 0)
    async with Notify({"NOTIFY_SOCKET": manager.address}) as served._systemd:
        await served.__aexit__(None, None, None)
    assert manager.hear() == ([] if worn_out else ["STOPPING=1"])


async def test_a_node_is_ready_once_it_has_started_and_says_when_it_ends(manager: Manager, tmp_path: Path) -> None:
    folder = tmp_path / "definitions"
    folder.mkdir()
    (folder / "stuck.yml").write_text(STUCK)
    environ = {**os.environ, "NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1500000", "PENSTOCK_TOKEN": "t" * 32}
    command = [sys.executable, "-m", "penstock", "serve", str(folder), "--port", "0"]
    with (tmp_path / "log").open("wb") as log:
        node = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        await asyncio.to_thread(manager.wait_for, "READY=1")
        assert manager.heard[0] == "WATCHDOG=1", "from the first moment"
        assert "serving HTTP at" in (tmp_path / "log").read_text(), "not before it serves"
        await eventually((folder / "stuck").exists)
        manager.hear()
        before = len(manager.heard)
        await eventually((folder / "free").exists)
        assert len(manager.hear()) - before <= 2, "a worker that blocks the loop keeps it silent"
        await eventually(lambda: len(manager.hear()) > before + 2)
        node.send_signal(signal.SIGTERM)
        await asyncio.to_thread(manager.wait_for, "STOPPING=1")
    finally:
        node.kill()  # the worker would take its grace
        node.wait()
