"""The two databases of the demo: the readings, which can be taken away, and what the alerts route knows.

Neither has a unique key: what comes twice is to be seen twice.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("DEMO_FOLDER", "demo-run")).absolute()
STORE = FOLDER / "store"
READINGS = STORE / "readings.db"
ALERTS = FOLDER / "alerts.db"

_AWAY = FOLDER / "store.away"


def connect(path: Path) -> sqlite3.Connection:
    """:raises sqlite3.OperationalError: it is not there."""
    # mode=rw: else SQLite would put an empty database where one has been taken away.
    return sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)


def create() -> None:
    STORE.mkdir(parents=True)
    for path, tables in (
        (READINGS, ["readings (id TEXT, attempt INTEGER, sensor TEXT, value REAL, unit TEXT, at REAL)"]),
        (
            ALERTS,
            [
                "seen (id TEXT, sensor TEXT, value REAL)",
                "alerts (id TEXT, sensor TEXT, value REAL, average REAL, at REAL)",
            ],
        ),
    ):
        with closing(sqlite3.connect(path)) as database:
            for table in tables:
                database.execute(f"CREATE TABLE {table}")


def take_away() -> None:
    """Move the readings' database where nobody finds it, as a lost disk or a server switched off would."""
    with closing(connect(READINGS)) as database:
        database.execute("BEGIN EXCLUSIVE")  # not under a writer's hands: a file torn in two is another story
        STORE.rename(_AWAY)


def bring_back() -> None:
    """Idempotent."""
    if _AWAY.exists():
        _AWAY.rename(STORE)


def stored() -> list[tuple[str, int]]:
    """The id and attempt of every row, in the order of storing."""
    return _rows(READINGS, "SELECT id, attempt FROM readings ORDER BY rowid")


def seen() -> list[str]:
    """The id of every reading that the alerts route has seen, as often as it has."""
    return [id for (id,) in _rows(ALERTS, "SELECT id FROM seen")]


def alerts() -> list[tuple[str, float, float]]:
    """Sensor, value and average of each alert, first raised first."""
    return _rows(ALERTS, "SELECT sensor, value, average FROM alerts GROUP BY id ORDER BY min(rowid)")


def series(sensor: str) -> list[tuple[float, float]]:
    """Unix time and value of each reading of a sensor, in the order of time."""
    return _rows(READINGS, "SELECT at, value FROM readings WHERE sensor = ? GROUP BY id ORDER BY at", sensor)


def count() -> int | None:
    """The readings stored so far; None while the database is away."""
    try:
        ((number,),) = _rows(READINGS, "SELECT count(DISTINCT id) FROM readings")
    except sqlite3.OperationalError:
        return None
    result: int = number
    return result


def _rows(path: Path, query: str, *values: object) -> list[Any]:
    with closing(connect(path)) as database:
        return database.execute(query, values).fetchall()
