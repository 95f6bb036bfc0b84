"""A process with one single worker, to be killed and halted: notes when it ran, and in what epoch."""

from __future__ import annotations

import asyncio
import os
import time

from penstock import App, Runtime

app = App(os.environ["FAULTS_STORE"])
LEDGER = os.open(os.environ["FAULTS_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@app.worker("single", watch_interval=0.01)
async def write() -> None:
    while True:
        now = time.monotonic()  # before it asks: it may be halted in between
        if not Runtime.running():
            return
        os.write(LEDGER, f"{now:.6f} {Runtime.epoch()} {os.getpid()}\n".encode())
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    app.run()
