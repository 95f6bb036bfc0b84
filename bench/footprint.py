"""What Penstock costs when it does nothing: import time, memory, processor. Linux."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

IDLE_APP = """
from penstock import App, Message
app = App("sqlite:///idle.db")
@app.route("q")
async def handle(message: Message): ...
app.run()
"""


def import_seconds() -> float:
    """Of `import penstock`, beyond an empty interpreter; median of nine pairs."""

    def run(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    return statistics.median(run("import penstock") - run("pass") for _ in range(9))


def idle(folder: Path, seconds: float = 10.0) -> tuple[float, float]:
    """Share of one core, and MiB resident, of a consumer that waits."""
    process = subprocess.Popen([sys.executable, "-c", IDLE_APP], cwd=folder, stderr=subprocess.DEVNULL)
    try:
        time.sleep(2)  # it starts
        return cost(process.pid, seconds)
    finally:
        process.terminate()
        process.wait()


def cost(pid: int, seconds: float) -> tuple[float, float]:
    """Share of one core, and MiB resident, of a process."""
    before = _processor_seconds(pid)
    time.sleep(seconds)
    used = _processor_seconds(pid) - before
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return used / seconds, int(resident) / 1024


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
