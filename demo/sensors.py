"""A source: reads this machine's sensors ten times a second and publishes to "readings", until SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil

from demo.ledger import PUBLISHED
from penstock import Client, Unroutable

INTERVAL = 0.1  # seconds


def rate(total: Callable[[], float | None]) -> Callable[[], float | None]:
    """What a counter of bytes gains, in KiB a second; None where the machine does not count."""
    before: float | None = None
    when = 0.0

    def gained() -> float | None:
        nonlocal before, when
        earlier, since = before, when
        before, when = total(), time.monotonic()
        if before is None or earlier is None:
            return None
        return (before - earlier) / 1024 / (when - since)

    return gained


def disk_bytes() -> float | None:
    counters = psutil.disk_io_counters()
    return counters.read_bytes + counters.write_bytes if counters else None


def network_bytes() -> float | None:
    counters = psutil.net_io_counters()
    return counters.bytes_recv + counters.bytes_sent if counters else None


SENSORS: dict[str, tuple[str, Callable[[], float | None]]] = {
    "cpu": ("%", psutil.cpu_percent),
    "memory": ("%", lambda: psutil.virtual_memory().percent),
    "disk": ("KiB/s", rate(disk_bytes)),
    "network": ("KiB/s", rate(network_bytes)),
}


def measure() -> list[dict[str, Any]]:
    """One reading of each sensor that this machine has."""
    at = time.time()
    measured = [(sensor, unit, read()) for sensor, (unit, read) in SENSORS.items()]
    return [
        {"sensor": sensor, "value": round(value, 3), "unit": unit, "at": at}
        for sensor, unit, value in measured
        if value is not None
    ]


async def main() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    measure()  # rates and CPU time are differences: the first look only begins them
    async with Client() as client:
        while not stop.is_set():
            await asyncio.sleep(INTERVAL)
            try:
                ids = await client.publish_many("readings", measure())
            except Unroutable:
                continue  # no consumer has ever run: nobody has asked for readings yet
            PUBLISHED.write("published", ids=ids)


if __name__ == "__main__":
    asyncio.run(main())
