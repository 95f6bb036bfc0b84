"""Time, and the waiting between attempts."""

from __future__ import annotations

import random
import time
from typing import Protocol


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


def backoff_delay(attempt: int, backoff: tuple[float, float], rng: random.Random) -> float:
    """Seconds to wait after the `attempt`-th failure (1-based): exponential with full jitter.

    Uniform between 0 and `min(longest, first * 2 ** (attempt - 1))`, so that messages that failed
    together do not come back together.
    """
    first, longest = backoff
    ceiling = min(longest, first * 2.0 ** min(attempt - 1, 64))
    return rng.uniform(0.0, ceiling)
