"""Waiting for something to become true, at most so long."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")

LOOK = 0.01  # seconds between two looks


@overload
async def eventually(condition: Callable[[], Awaitable[T]], within: float = 15.0) -> T: ...


@overload
async def eventually(condition: Callable[[], T], within: float = 15.0) -> T: ...


async def eventually(condition: Callable[[], Any], within: float = 15.0) -> Any:
    """The first true value of `condition`, plain or awaitable, looked at until `within` seconds are over.

    :raises AssertionError: it was never true.
    """
    until = time.monotonic() + within
    while True:
        found = condition()
        value = await found if inspect.isawaitable(found) else found
        if value:
            return value
        if time.monotonic() >= until:
            raise AssertionError(f"not within {within:g} s: last seen {value!r}")
        await asyncio.sleep(LOOK)
