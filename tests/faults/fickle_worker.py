"""A worker whose first attempt dies in its transaction, and whose next one does not come to it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from penstock import App, Task, transaction
from penstock.testing.faults import Ledger

app = App(os.environ["FAULTS_BROKER"], store=os.environ["FAULTS_STORE"], lease=float(os.environ["FAULTS_LEASE"]))
ledger = Ledger(os.environ["FAULTS_LEDGER"])
DEADLY = Path(os.environ["FAULTS_DEADLY"])


@app.on_startup
def up() -> None:
    ledger.write("up", "")


@app.task
async def fickle(task: Task) -> None:
    if not DEADLY.exists():
        raise KeyError("settings")
    async with transaction() as t:
        await t.step("pay", ledger.write, "paid", task.taskid)
        DEADLY.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    app.run()
