"""Time, and the waiting between attempts."""

from __future__ import annotations

import random
import time
from typing import Any, Protocol

LONGEST = 100 * 365.25 * 86_400
"""Seconds of a hundred years: no wait, expiry or backoff is longer."""


class Clock(Protocol):
    """Where the engine and the memory broker read the time, so that a simulation can supply it."""

    def time(self) -> float:
        """Unix time in seconds: what is written into messages."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump: what leases and waits are measured in."""
        ...


class SystemClock:
    """The machine's clocks. The monotonic one is common to all processes of a machine since its boot."""

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


SYSTEM_CLOCK = SystemClock()


def is_seconds(value: Any, *, above_zero: bool = False) -> bool:
    """Whether it is a number of seconds that can be waited for: 0, or only above, to a hundred years."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= LONGEST and not (above_zero and value == 0)


def is_backoff(value: Any) -> bool:
    """Whether it is (first, longest), both in seconds."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return all(map(is_seconds, value)) and bool(value[0] <= value[1])


def backoff_delay(attempt: int, backoff: tuple[float, float], rng: random.Random) -> float:
    """Seconds to wait after the `attempt`-th failure (1-based): exponential with full jitter.

    Uniform between 0 and `min(longest, first * 2 ** (attempt - 1))`, so that messages that failed
    together do not come back together.
    """
    first, longest = backoff
    ceiling = min(longest, first * 2.0 ** min(attempt - 1, 64))
    return rng.uniform(0.0, ceiling)
