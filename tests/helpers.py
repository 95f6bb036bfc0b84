"""Small tools of the tests."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

from penstock import App
from penstock.brokers.base import Capabilities, QueueInfo

PATIENCE = 20.0  # seconds; only ever waited for in full by a failing test


async def eventually(condition: Callable[[], Any], what: str = "", within: float = PATIENCE) -> Any:
    """The first true value of a condition, plain or async."""
    until = time.monotonic() + within
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < until, f"not within {within} s: {what or inspect.getsource(condition).strip()}"
        await asyncio.sleep(0.005)


def eventually_sync(condition: Callable[[], Any], what: str = "", within: float = PATIENCE) -> Any:
    """The same for blocking tests."""
    until = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, f"not within {within} s: {what}"
        time.sleep(0.01)


async def capabilities(app: App) -> Capabilities:
    """What an app's broker can do."""
    return (await app.client._pool.get()).capabilities


async def queue_info(app: App, name: str) -> QueueInfo:
    """A queue as its broker sees it."""
    broker = await app.client._pool.get()
    assert broker.admin is not None
    (info,) = await broker.admin.inspect([name])
    return info


async def dead_letters(app: App, queue: str) -> list[Any]:
    """The dead letters of a queue, read."""
    from penstock.control import dead_letters as control

    return (await control.look(await app.client._pool.get(), queue, 1000)).letters
