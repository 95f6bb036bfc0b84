"""Waiting for something to become true, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], Any], what: str, within: float, pause: float = 0.02) -> Any:
    """The first true value of a condition.

    :raises TimeoutError: not within so many seconds.
    """
    until = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until:
            raise TimeoutError(f"not within {within:g} s: {what}")
        time.sleep(pause)


def seconds_until(condition: Callable[[], Any], what: str, within: float, pause: float = 0.02) -> float:
    """How long it took until a condition was true.

    :raises TimeoutError: not within so many seconds.
    """
    start = time.monotonic()
    wait_until(condition, what, within, pause)
    return time.monotonic() - start
