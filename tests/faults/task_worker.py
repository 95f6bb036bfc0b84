"""A worker to be killed: notes in a ledger which tasks it starts and finishes."""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any

from penstock import App, Task, context
from penstock.testing.faults import Ledger

app = App(
    os.environ["FAULTS_BROKER"],
    store=os.environ["FAULTS_STORE"],
    lease=float(os.environ["FAULTS_LEASE"]),
    grace=10,
)
ledger = Ledger(os.environ["FAULTS_LEDGER"])


@app.on_startup
def up() -> None:
    ledger.write("up", "")


@app.task(concurrency=4)
async def work(task: Task) -> Any:
    ledger.write("started", task.taskid, context.message.attempt)
    await asyncio.sleep(random.uniform(0, 0.02))
    ledger.write("finished", task.taskid, context.message.attempt)
    return task.content


@app.task(timeout=1)
def spin(request: Any) -> None:
    while True:
        pass


@app.task(timeout=0.3, concurrency=2)
def sits_in_c(request: Any) -> None:
    time.sleep(600)


@app.task(timeout=0.3)
async def swallows(request: Any) -> None:
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            continue


@app.task(timeout=1, isolation="process")
def sits_in_c_alone(request: Any) -> Any:
    if request == "hang":
        time.sleep(600)
    return request


@app.task
async def echo(request: Any) -> Any:
    await asyncio.sleep(0.01)
    return request


if os.environ.get("FAULTS_TICK"):

    @app.every(float(os.environ["FAULTS_TICK"]), concurrency=8)
    async def tick(task: Task) -> None:
        ledger.write("ticked", task.taskid)


if __name__ == "__main__":
    app.run()
