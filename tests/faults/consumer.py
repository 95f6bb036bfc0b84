"""A consumer to be killed: notes in a ledger what it starts and finishes."""

from __future__ import annotations

import asyncio
import os
import random
import time

from penstock import App, Message
from penstock.testing.faults import Ledger

app = App(
    os.environ["FAULTS_BROKER"],
    lease=float(os.environ["FAULTS_LEASE"]),
    prefetch=int(os.environ["FAULTS_PREFETCH"]),
    grace=10,
)
ledger = Ledger(os.environ["FAULTS_LEDGER"])


@app.on_startup
def up() -> None:
    ledger.write("up", "")


@app.route("work", concurrency=4, backoff=(0.05, 0.2))
async def work(message: Message) -> None:
    ledger.write("started", message.id, message.attempt)
    await asyncio.sleep(random.uniform(0, 0.004))
    ledger.write("finished", message.id, message.attempt)


@app.route("poisoned", bulk_size=8, bulk_timeout=0.2)
async def poisoned(messages: list[Message]) -> None:
    for message in messages:
        ledger.write("started", message.id, message.attempt)
    if any(message.body == "poison" for message in messages):
        os._exit(9)
    for message in messages:
        ledger.write("finished", message.id, message.attempt)


@app.route("slow")
async def slow(message: Message) -> None:
    ledger.write("started", message.id, message.attempt)
    if message.body == "block":
        time.sleep(3.5)  # blocks the loop, which is what it is for
    else:
        await asyncio.sleep(10 if message.body == "first" and message.attempt == 1 else 0.3)
    ledger.write("finished", message.id, message.attempt)


@app.route("dawdling", concurrency=4)
async def dawdling(message: Message) -> None:
    await asyncio.sleep(0.05)
    ledger.write("finished", message.id, message.attempt)


if __name__ == "__main__":
    app.run()
