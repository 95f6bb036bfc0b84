"""A worker to be killed in the midst of transactions: notes in a ledger what each step did, and each event."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
from typing import Any

from penstock import App, Task, transaction
from penstock.tasks.journal import STATUSES
from penstock.testing.faults import Ledger

STEPS = ("pay", "pack", "ship", "bill")

app = App(
    os.environ["FAULTS_BROKER"],
    store=os.environ["FAULTS_STORE"],
    lease=float(os.environ["FAULTS_LEASE"]),
    grace=10,
)
app.transactions.events = True
ledger = Ledger(os.environ["FAULTS_LEDGER"])


@app.on_startup
def up() -> None:
    ledger.write("up", "")


async def act(taskid: str, step: str, before: str) -> str:
    """Another result each time that it is done."""
    ledger.write("started", f"{taskid} {step}")
    await asyncio.sleep(random.uniform(0, 0.02))
    result = os.urandom(4).hex()
    ledger.write("finished", f"{taskid} {step} {before} {result}")
    await asyncio.sleep(random.uniform(0, 0.02))
    return result


async def unact(taskid: str, step: str, result: str) -> None:
    await asyncio.sleep(random.uniform(0, 0.02))
    ledger.write("undone", f"{taskid} {step} {result}")
    await asyncio.sleep(random.uniform(0, 0.02))


@app.task(concurrency=2)
async def order(task: Task) -> list[str]:
    results = ["-"]
    async with transaction("order") as t:
        for step in STEPS:
            undo = functools.partial(unact, task.taskid, step)
            results.append(await t.step(step, act, task.taskid, step, results[-1], undo=undo))
    return results[1:]


@app.task
async def deadly(task: Task) -> None:
    async with transaction() as t:
        await t.step("pay", ledger.write, "paid", task.taskid)
        await t.step("die", die)


def die() -> None:
    if os.path.exists(os.environ["FAULTS_DEADLY"]):
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(topics=[f"Transaction.{status}" for status in STATUSES], concurrency=2)
async def listen(task: Any) -> None:
    ledger.write("event", f"{task.taskid} {task.content['id']} {task.content['status']}")


if __name__ == "__main__":
    app.run()
