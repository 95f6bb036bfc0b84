"""A node: what a thousand residents cost, tasks over HTTP, one definition among a thousand changed."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import footprint
from bench.report import Report

RESIDENTS = 1000
CLIENTS = 32
SECONDS = 8.0
CHANGES = 9
TOKEN = secrets.token_urlsafe(24)

RESIDENT = """\
- name: w{n}
  category: bench
  mode: multi
  script: |-
    async def w{n}():
        while Runtime.running():
            await asyncio.sleep(3600)
"""
JOB = """\
- name: job
  topics: [bench]
  script: return task.content.n
"""
TELLS = """\
- name: told
  mode: multi
  script: |-
    async def told():
        with open("told", "w") as file:
            file.write("{n}")
        while Runtime.running():
            await asyncio.sleep(0.01)
"""


def run(report: Report) -> None:
    report.title(f"A node on SQLite, {RESIDENTS:,} workers that wait; POST /tasks from {CLIENTS} clients")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n in range(RESIDENTS):
            (folder / f"w{n}.yml").write_text(RESIDENT.format(n=n))
        with _serving(folder) as (pid, _):
            time.sleep(5)
            share, resident = footprint.cost(pid, 20.0)
            report.row("idle, of one core", f"{share:.2%}", "< 2%", share < 0.02)
            report.row("idle, resident", f"{resident:.0f} MiB", "< 200 MB", resident * 1.048576 < 200)
            _change(folder, CHANGES)  # there is one to change
            slowest = max(_change(folder, n) for n in range(CHANGES))
            report.row(f"one definition changed, slowest of {CHANGES}", f"{slowest:.2f} s", "< 0.5 s", slowest < 0.5)
    rate = _posting(JOB.replace("bench", "another"))
    report.row("POST /tasks, accepted", f"{rate:,.0f}/s", ">= 2,000/s", rate >= 2000)
    report.row("POST /tasks, each run by the same node too", f"{_posting(JOB):,.0f}/s", "", True)


def _posting(job: str) -> float:
    """Tasks accepted a second by a node that hosts one job."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "job.yml").write_text(job)
        with _serving(Path(name)) as (_, port):
            return _post(port)


def _change(folder: Path, n: int) -> float:
    """Seconds from writing a file until the changed worker has run."""
    new, told = folder / "told.new", folder / "told"
    new.write_text(TELLS.format(n=n))
    start = time.perf_counter()
    new.rename(folder / "told.yml")
    while time.perf_counter() - start < 30:
        if told.exists() and told.read_text() == str(n):
            return time.perf_counter() - start
        time.sleep(0.002)
    raise RuntimeError("a changed definition was not applied within 30 s")


def _post(port: int) -> float:
    """Tasks accepted a second: by as many threads, in processes of their own."""
    code = (
        "import sys; from bench.on_node import client; client(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(port), str(SECONDS), str(CLIENTS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "PENSTOCK_TOKEN": TOKEN})
    return int(done.stdout) / SECONDS


def client(port: int, seconds: float, clients: int) -> None:
    """Prints how many tasks were accepted by a node, asked by so many clients at once, raw over their sockets."""
    body = json.dumps({"topic": "bench", "content": {"n": 1}, "expire": 60}).encode()
    head = (
        f"POST /tasks HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {os.environ['PENSTOCK_TOKEN']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    accepted = [0] * clients
    until = time.monotonic() + seconds

    def ask(which: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
            while time.monotonic() < until:
                line.sendall(head + body)
                answer = line.recv(65_536)
                if not answer.startswith(b"HTTP/1.1 202"):
                    raise RuntimeError(answer[:200])
                while b'"taskid"' not in answer:
                    answer += line.recv(65_536)
                accepted[which] += 1

    threads = [threading.Thread(target=ask, args=(which,)) for which in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(sum(accepted))


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[int, int]]:
    """`penstock serve`, ready; its process and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = [sys.executable, "-m", "penstock", "serve", ".", "--port", str(port), "--log-level", "warning"]
    command += ["--broker", f"sqlite:///{folder}/penstock.db", "--store", f"sqlite:///{folder}/penstock.db"]
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, "PENSTOCK_TOKEN": TOKEN})
    try:
        until = time.monotonic() + 60
        while not _ready(port):
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError("the node did not become ready")
            time.sleep(0.05)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait(60)


def _ready(port: int) -> bool:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        line.request("GET", "/readyz")
        return line.getresponse().status == 200
    except OSError:
        return False
    finally:
        line.close()
