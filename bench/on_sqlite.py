"""SQLite against its own driver, and what Penstock costs when it does nothing."""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench import engine, footprint, sqlite_raw, tasks
from bench.report import Report

COUNT = 20_000
ROUNDS = 5
BACKLOG = 1_000_000

BODIES = [{"n": n, "name": "somebody", "value": 3.14159} for n in range(COUNT)]
ENCODED = [msgspec.json.encode(body) for body in BODIES]


def run(report: Report) -> None:
    report.title(f"SQLite, synchronous=FULL, {COUNT:,} messages, median of {ROUNDS} paired rounds")
    pairs = _paired(_one_at_a_time)
    report.ratio("one at a time, concurrency 100", pairs, 0.30)
    rate = statistics.median(ours for ours, _ in pairs)
    report.row("one at a time, concurrency 100", f"{rate:,.0f}/s", ">= 60,000/s", rate >= 60_000)
    report.ratio("bulk 100", _paired(_in_bulk), 0.50)
    report.ratio("publish_many", _paired(_publishing), 0.20)
    sent, done = (statistics.median(column) for column in zip(*_paired(_tasks), strict=True))
    report.row("tasks sent, 500 gathered", f"{sent:,.0f}/s", "", True)
    report.row("tasks run, results stored", f"{done:,.0f}/s", ">= 10,000/s", done >= 10_000)
    small, large = _backlog(10_000), _backlog(BACKLOG)
    figure = f"{large:,.0f}/s of {small:,.0f}/s"
    report.row(f"backlog of {BACKLOG:,} against 10,000", figure, ">= 0.90", large >= 0.9 * small)
    seconds = footprint.import_seconds()
    report.row("import penstock", f"{seconds:.3f} s", "< 0.15 s", seconds < 0.15)
    if sys.platform == "linux":
        with tempfile.TemporaryDirectory() as folder:
            share, resident = footprint.idle(Path(folder))
        report.row("idle consumer, of one core", f"{share:.2%}", "< 1%", share < 0.01)
        report.row("idle consumer, resident", f"{resident:.0f} MiB", "< 60 MB", resident * 1.048576 < 60)


def _paired(measure: Callable[[Path], tuple[float, float]]) -> list[tuple[float, float]]:
    """The rounds, each in a folder of its own; the first is not counted."""
    pairs = []
    for _ in range(ROUNDS + 1):
        with tempfile.TemporaryDirectory() as folder:
            pairs.append(measure(Path(folder)))
    return pairs[1:]


def _publishing(folder: Path) -> tuple[float, float]:
    yardstick = sqlite_raw.publish(sqlite_raw.connect(folder / "raw.db"), ENCODED)
    return asyncio.run(engine.publish(_url(folder), BODIES)), yardstick


def _tasks(folder: Path) -> tuple[float, float]:
    return asyncio.run(tasks.run(_url(folder), COUNT // 2))


def _one_at_a_time(folder: Path) -> tuple[float, float]:
    return _consuming(folder, concurrency=100)


def _in_bulk(folder: Path) -> tuple[float, float]:
    return _consuming(folder, bulk_size=100)


def _consuming(folder: Path, **options: int) -> tuple[float, float]:
    connection = sqlite_raw.connect(folder / "raw.db")
    sqlite_raw.publish(connection, ENCODED)
    yardstick = sqlite_raw.consume(connection)
    asyncio.run(engine.publish(_url(folder), BODIES))
    return asyncio.run(engine.consume(_url(folder), COUNT, **options)), yardstick


def _backlog(size: int) -> float:
    """Messages a second for the first ten thousand of a backlog; median of three."""
    rates = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as name:
            url = _url(Path(name))
            for start in range(0, size, COUNT):
                asyncio.run(engine.publish(url, BODIES[: min(COUNT, size - start)]))
            rates.append(asyncio.run(engine.consume(url, 10_000, concurrency=100)))
    return statistics.median(rates)


def _url(folder: Path) -> str:
    return f"sqlite:///{folder}/ours.db"
