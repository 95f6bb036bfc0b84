"""A ledger that survives any process that writes to it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """One line of a ledger."""

    event: str
    id: str
    attempt: int
    pid: int


class Ledger:
    """A file to which many processes append what they did. A line is on the disk when `write` returns."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_DSYNC, 0o600)

    def write(self, event: str, id: str, attempt: int = 0) -> None:
        os.write(self._file, json.dumps([event, id, attempt, os.getpid()]).encode() + b"\n")

    def entries(self) -> Iterator[Entry]:
        complete, _, _ = self.path.read_bytes().rpartition(b"\n")  # the last line may be half written
        for line in complete.splitlines():
            yield Entry(*json.loads(line))

    def count(self, event: str) -> int:
        return sum(entry.event == event for entry in self.entries())

    def times(self, event: str) -> Counter[str]:
        """How often each id met an event."""
        return Counter(entry.id for entry in self.entries() if entry.event == event)

    def unfinished(self, pid: int) -> set[str]:
        """What a process started and did not finish."""
        mine = [entry for entry in self.entries() if entry.pid == pid]
        started = {entry.id for entry in mine if entry.event == "started"}
        return started - {entry.id for entry in mine if entry.event == "finished"}
