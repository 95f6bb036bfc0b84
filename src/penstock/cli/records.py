"""Tasks' records as people read them."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import msgspec

from penstock.cli.output import clean, print_facts
from penstock.stores.records import Run, TaskRecord
from penstock.terms import Failure


def print_outcome(record: TaskRecord) -> None:
    """What came of a task, and of each of its runs."""
    print(f"{record.taskid}: {record.state}{_in_time(record)}")
    for run in record.runs:
        print(f"{clean(run.task)}: {run.state}{_outcome(run)}")


def print_record(record: TaskRecord) -> None:
    """All that is known of a task."""
    facts = (
        ("taskid", record.taskid),
        ("topic", record.topic),
        ("state", record.state),
        ("created", record.createdAt),
        ("completed", record.completedAt),
        ("expires", record.expiresAt),
    )
    print_facts(facts, 11)
    print(f"{'content:':<11}{clean(text(record.content), lines=True)}")
    for run in record.runs:
        print()
        _print_run(run)


def print_tracebacks(record: TaskRecord) -> None:
    """Where the runs failed, on stderr."""
    for run in record.runs:
        if run.error is not None and run.error.traceback:
            print(clean(run.error.traceback.rstrip(), lines=True), file=sys.stderr)


def why_not(record: TaskRecord) -> str:
    """In one line why a task that has ended did not succeed."""
    causes = [run for run in record.runs if run.state == record.state]
    names = ", ".join(run.task for run in causes)
    if record.state == "expired":
        return f"nobody took task {record.taskid} in time" + (f" for {names}" if names else "")
    if record.state == "cancelled":
        return f"task {record.taskid} was cancelled"
    others = f" ({len(causes)} of {len(record.runs)} runs failed)" if len(record.runs) > 1 else ""
    first = causes[0]
    return f"task {record.taskid} failed: {first.task}: {_error(first.error)}{others}"


def took(record: TaskRecord) -> str:
    """From its beginning to its end."""
    if record.completedAt is None:
        return "-"
    spent = datetime.fromisoformat(record.completedAt) - datetime.fromisoformat(record.createdAt)
    seconds = max(spent.total_seconds(), 0.0)
    return f"{seconds:.2f}s" if seconds < 10 else f"{seconds:.0f}s"


def text(value: Any) -> str:
    """Text as it is, everything else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def names(record: TaskRecord) -> str:
    """Which tasks run, or ran; with their states where those differ from the whole's."""
    return ", ".join(run.task if run.state == record.state else f"{run.task} {run.state}" for run in record.runs)


def _print_run(run: Run) -> None:
    print(f"{'run of:':<11}{clean(run.task)}, {run.state}")
    if run.progress is not None:
        print(f"{'progress:':<11}{run.progress[0]:g} of {run.progress[1]:g}")
    if run.state == "succeeded":
        print(f"{'result:':<11}{clean(text(run.result), lines=True)}")
    if run.error is not None:
        print(f"{'error:':<11}{clean(' '.join(_error(run.error).split()))}")
    for one in run.attempts:
        said = "" if one.error is None else f": {one.error}"
        print(
            clean(f"attempt {one.number}: {one.startedAt} to {one.endedAt or '-'}, {one.outcome}, {one.worker}{said}")
        )
    if run.error is not None and run.error.traceback:
        print(clean(run.error.traceback.rstrip(), lines=True))


def _in_time(record: TaskRecord) -> str:
    return "" if record.completedAt is None else f" in {took(record)}"


def _outcome(run: Run) -> str:
    if run.state == "succeeded":
        return f": {clean(text(run.result), lines=True)}"
    return f": {clean(' '.join(_error(run.error).split()))}" if run.state == "failed" else ""


def _error(error: Failure | None) -> str:
    if error is None:
        return "it is not known why"
    return f"{error.type}: {error.message}" if error.message else error.type
