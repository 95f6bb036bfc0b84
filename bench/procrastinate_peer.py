"""The same work through Procrastinate, where it is installed (`pip install procrastinate`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import asyncpg

SCHEMA = "penstock_bench_peer"


async def consume(dsn: str, count: int, concurrency: int = 100) -> float | None:
    """Jobs a second, deferred in one batch, run by one worker; None: it is not installed."""
    try:
        import procrastinate
    except ImportError:
        return None
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    admin = await asyncpg.connect(dsn)
    await admin.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE; CREATE SCHEMA {SCHEMA}")
    connector = procrastinate.PsycopgConnector(
        conninfo=f"{dsn}?options=-csearch_path%3D{SCHEMA}", max_size=concurrency // 5
    )
    app = procrastinate.App(connector=connector)
    left, done = count, asyncio.Event()

    @app.task(queue="bench")
    async def nothing(n: int) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            done.set()

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        await nothing.batch_defer_async(*({"n": n} for n in range(count)))
        start = time.perf_counter()
        worker = asyncio.create_task(app.run_worker_async(concurrency=concurrency, install_signal_handlers=False))
        await done.wait()
        rate = count / (time.perf_counter() - start)
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker
    await admin.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
    await admin.close()
    return rate
