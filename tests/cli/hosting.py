"""A real `penstock serve` for the tests of the commands that ask a node."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cli.conftest import Running, Shell
from tests.helpers import eventually_sync

SERVING = re.compile(r"serving HTTP at (\S+)")

DEFINITIONS = {
    "workers.yml": """
- name: produce
  category: demo
  mode: single
  watch_interval: 0.05
  script: |
    async def run():
        open("produced", "a").write("x")
- name: fails? 100%
  mode: multi
  script: |
    async def run():
        raise ValueError("no \\x1b[31mgood")
""",
    "jobs.yml": """
- name: greet
  topics: [hello]
  script: |
    if task.content.name == "Smith":
        raise ValueError("not him")
    return "hello " + task.content.name
- name: linger
  topics: [slow]
  script: |
    await asyncio.sleep(1000)
""",
    "configs/db.yml": "host: db\npassword: swordfish\nurl: amqp://neo:swordfish@db/\n",
    "configs/crew/main.yml": "port: 1\n",
}


class Hosted(Shell):
    """A node, and commands that find it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        del self.environment["PENSTOCK_BROKER"]
        self.environment["XDG_RUNTIME_DIR"] = str(folder / "run")
        self.environment["HOME"] = str(folder)
        for name in [name for name in self.environment if name.startswith("PENSTOCK_")]:
            del self.environment[name]

    def serve(self, port: int = 0, **env: str) -> tuple[Running, str]:
        """A started node, and its URL."""
        (self.folder / "run").mkdir(mode=0o700, exist_ok=True)
        served = self.folder / "served"
        for name, text in DEFINITIONS.items():
            path = served / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        running = self.start("serve", str(served), "--port", str(port), "--log-level", "info", **env)
        eventually_sync(lambda: "hosts 2 workers" in running.log or running.process.poll() is not None, "serving")
        found = SERVING.search(eventually_sync(lambda: "serving HTTP" in running.log and running.log, running.log, 5))
        assert found, running.log
        return running, found[1]


@contextmanager
def hosted(folder: Path) -> Iterator[tuple[Hosted, str]]:
    """Commands, and the URL of a node that they find."""
    shell = Hosted(folder)
    try:
        running, url = shell.serve()
        yield shell, url
        running.send(signal.SIGTERM)
        assert running.ended() == 0, running.log
    finally:
        shell.stop()


def refused_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
