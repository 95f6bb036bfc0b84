"""The last lines that each worker has logged."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from penstock.errors import printable
from penstock.workers.runtime import current_run

LINES = 50
"""Kept of each worker."""
LONGEST = 500  # characters of a line

_format = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s").format


class Tail(deque[str]):
    """The last lines of one worker, the oldest first. `changed` is called when there are more."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        super().__init__(maxlen=LINES)
        self.changed = changed


class Catcher(logging.Handler):
    """Gives each record to the worker in whose run it was logged, whatever the logger."""

    def emit(self, record: logging.LogRecord) -> None:
        run = current_run.get()
        if run is None:
            return
        try:
            line = _format(record)
        except Exception:
            self.handleError(record)
            return
        run.tail.extend(printable(one[:LONGEST]) for one in line.splitlines())
        run.tail.changed()


_catcher = Catcher()
_users = 0


def catch() -> None:
    """Keep what workers log; undone by as many calls of `let_go`."""
    global _users
    _users += 1
    if _users == 1:
        logging.getLogger().addHandler(_catcher)


def let_go() -> None:
    """Keep it no more."""
    global _users
    _users -= 1
    if _users == 0:
        logging.getLogger().removeHandler(_catcher)
