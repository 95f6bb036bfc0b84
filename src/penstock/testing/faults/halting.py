"""Halting a process with SIGSTOP, and knowing that it stands still."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from pathlib import Path

from penstock.testing.faults.waiting import wait_until

STANDS_WITHIN = 10.0
"""Seconds for the last of its threads to leave the system call that it is in."""


def halt(pid: int, beside: Path | None = None) -> None:
    """SIGSTOP, and wait until every thread stands still: one in a system call comes to its end first.

    :param beside: an SQLite file that it writes with others. Who is halted in the middle of a transaction
        holds up them all, which is another fault: such a process goes on, and is halted a moment later.
    :raises TimeoutError: it does not stand still, or writes all the time.
    """

    def stands() -> bool:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: _states(pid) <= {"T", "t"}, f"process {pid} stands still", STANDS_WITHIN, pause=0.001)
        if beside is None or _can_be_written(beside):
            return True
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)
        return False

    wait_until(stands, f"process {pid} is between two transactions", STANDS_WITHIN, pause=0.0)


def _states(pid: int) -> set[str]:
    """The states of its threads, as proc(5) has them. Those that have ended in between have none."""
    found = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.add((thread / "stat").read_text().rpartition(")")[2].split()[0])
    return found


def _can_be_written(file: Path) -> bool:
    """Whether nobody is in the middle of a transaction that writes. Another than the halted may be: for a moment."""
    with contextlib.closing(sqlite3.connect(file, timeout=0.5)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        connection.rollback()
        return True
