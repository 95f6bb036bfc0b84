"""What the demo's processes write down for the proof: one JSON line an event, on disk before they go on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo.database import FOLDER
from penstock import Message, Unavailable

MAX_HOLD = 10.0  # seconds; should nobody come to kill it, the consumer goes on

Event = dict[str, Any]


class Ledger:
    """A file that one process appends to (successors go on with it) and another follows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: list[Event] = []
        self._read_up_to = 0

    def write(self, what: str, **details: Any) -> None:
        line = json.dumps({"what": what, "pid": os.getpid(), "at": time.time(), **details}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)

    def events(self) -> list[Event]:
        """All that has been written so far."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read_up_to)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._read_up_to += len(whole) + 1
                self._events += map(json.loads, whole.split(b"\n"))
        return self._events

    def ids(self, what: str, pid: int | None = None) -> list[str]:
        """The messages that events of one kind name."""
        return [
            id
            for event in self.events()
            if event["what"] == what and pid in (None, event["pid"])
            for id in event["ids"]
        ]


PUBLISHED = Ledger(FOLDER / "published.jsonl")
"""The sources': `published`, once the broker has confirmed."""
BATCHES = Ledger(FOLDER / "batches.jsonl")
"""The store route's: `started`, then `stored` (the rows are committed) or `refused`, then `finished`."""


@contextmanager
def witnessed(messages: list[Message]) -> Iterator[None]:
    """Write down what becomes of a batch; hold still where the demo wants to kill."""
    ids = [message.id for message in messages]
    BATCHES.write("started", ids=ids)
    _hold_still("started", ids)
    try:
        yield
    except Unavailable:
        BATCHES.write("refused", ids=ids, attempts=[message.attempt for message in messages])
        raise
    BATCHES.write("stored", ids=ids)
    _hold_still("stored", ids)
    BATCHES.write("finished", ids=ids)


def hold_at(point: str) -> Path:
    """The file that makes the next batch hold still right after it has `started`, or is `stored`."""
    return FOLDER / f"hold-when-{point}"


def _hold_still(point: str, ids: list[str]) -> None:
    if len(ids) < 2 or not hold_at(point).exists():  # one message is not the middle of a batch
        return
    BATCHES.write("holding", point=point, ids=ids)
    until = time.monotonic() + MAX_HOLD
    while hold_at(point).exists() and time.monotonic() < until:
        time.sleep(0.01)
