"""Schedules as an operator sees them: what the store remembers of each."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Sequence

import msgspec

from penstock.errors import ConfigError, one_line
from penstock.stores.base import Entry, Store
from penstock.stores.records import moment
from penstock.stores.scanning import all_under
from penstock.tasks.instants import Cron, Every, Schedule
from penstock.tasks.schedule import State, key

log = logging.getLogger("penstock.schedule")

OVERDUE = 120.0  # seconds
_EVERY = re.compile(r"every (\S+) s")
_CRON = re.compile(r"cron '([^']*)' in (\S+)")


class ScheduleView(msgspec.Struct, frozen=True, kw_only=True):
    """One schedule. Times are ISO 8601 with offset.

    A schedule that has been taken out of its app stays, `overdue`: nobody says that it is gone.
    """

    name: str
    """The task's."""
    definition: str
    last: str | None
    """The last instant that was enqueued, or skipped, or the moment the schedule began at; None: unreadable."""
    next: str | None
    """The first instant beyond now; None: there is none, or the definition cannot be read."""
    overdue: bool
    """An instant is due for over two minutes: no process looks after this schedule, it seems."""
    enqueuing: int
    """Instants that a process is enqueuing now."""


async def schedules(store: Store, now: float | None = None) -> list[ScheduleView]:
    """Every schedule that a process has begun in this store, by name.

    :raises BrokerUnavailable: the store is away.
    """
    prefix = key("")
    now = time.time() if now is None else now
    entries = await all_under(store, prefix)
    return await asyncio.to_thread(_views, entries, len(prefix), now)  # it reads files of time zones


def _views(entries: Sequence[Entry], start: int, now: float) -> list[ScheduleView]:
    return [_view(entry.key[start:], entry.value, now) for entry in entries]


def _view(name: str, value: bytes, now: float) -> ScheduleView:
    try:
        state = msgspec.json.decode(value, type=State)
    except (msgspec.DecodeError, UnicodeError) as error:
        told = f"unreadable: {one_line(error)}"
        return ScheduleView(name=name, definition=told, last=None, next=None, overdue=False, enqueuing=0)
    schedule = read(name, state.definition)
    due = math.inf if schedule is None else schedule.next(state.last)
    coming = math.inf if schedule is None else schedule.next(max(now, state.last))
    return ScheduleView(
        name=name,
        definition=state.definition,
        last=moment(state.last),
        next=None if coming == math.inf else moment(coming),
        overdue=due < now - OVERDUE,
        enqueuing=len(state.claimed),
    )


def read(name: str, definition: str) -> Schedule | None:
    """A schedule from its definition as the store has it; None: one of a version that says it otherwise."""
    try:
        if found := _EVERY.fullmatch(definition):
            return Every(name, float(found[1]))
        if found := _CRON.fullmatch(definition):
            return Cron(name, found[1], found[2])
    except (ConfigError, ValueError) as error:
        log.debug("schedule %r: %s", name, one_line(error))
    return None
