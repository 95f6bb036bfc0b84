"""A process with a task that ends when the test wants it, and an office to give up: to be cut off and stopped."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from penstock import App, Task
from penstock.testing.faults import Ledger

app = App(
    os.environ["FAULTS_BROKER"],
    store=os.environ["FAULTS_STORE"],
    lease=float(os.environ["FAULTS_LEASE"]),
    grace=float(os.environ["FAULTS_GRACE"]),
)
ledger = Ledger(os.environ["FAULTS_LEDGER"])
GO_ON = Path(os.environ["FAULTS_GO_ON"])
"""Once this file is there the runs end."""


@app.task
async def held(task: Task) -> Any:
    ledger.write("started", task.taskid)
    while not GO_ON.exists():
        await asyncio.sleep(0.02)
    ledger.write("finished", task.taskid)
    return task.content


@app.worker("single")
async def master() -> None:
    ledger.write("holds", "master")
    await asyncio.Event().wait()


if __name__ == "__main__":
    app.run()
