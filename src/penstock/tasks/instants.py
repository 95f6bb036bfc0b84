"""When a schedule is due: arithmetic alone, no clock, so every process finds the same instants."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from fractions import Fraction
from typing import Any, Protocol
from urllib.parse import quote
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from penstock.errors import ConfigError, near

SHORTEST, LONGEST = 0.01, 1e9  # seconds between two instants of `Every`
MICROSECONDS = 1_000_000
DAY = 86_400
FOLD = 3 * 3600
"""Seconds by which a clock is put back at most."""
YEAR_2000 = 946_684_800
ANY_TIME = datetime.fromtimestamp(YEAR_2000, UTC)
FOREVER = 50 * 365 * DAY
"""Seconds without a match after which an expression is given up; cronsim gives up after as many years."""
LONGEST_NAME = 150  # characters of a name in an id: with the rest, what any message system takes
SYNTAX = "minute hour day month weekday, with an optional field of seconds in front"


class Schedule(Protocol):
    """The instants, in Unix seconds, at which a task is due."""

    name: str
    """The task's."""
    definition: str
    """What it was declared as, the same text for the same instants."""

    def instants(self, after: float, until: float, most: int) -> list[float]:
        """The instants t with after < t <= until, in order; the last `most` of them."""
        ...

    def next(self, after: float) -> float:
        """The first instant beyond `after`; infinite where there is none."""
        ...


def instant_id(name: str, instant: float) -> str:
    """The id of the task that is due at an instant: `collect@2026-11-21T06:40:00Z`, or `….250Z`, `….250001Z`.

    The same in every process. Of the name, what is no letter, digit or one of `_.-~` is written `%2F`; a
    long one is cut and told apart by its hash.
    """
    seconds, micros = divmod(round(instant * MICROSECONDS), MICROSECONDS)
    text = quote(name, safe="")
    if len(text) > LONGEST_NAME:
        text = f"{text[:LONGEST_NAME]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    millis, rest = divmod(micros, 1000)
    fraction = f".{micros:06d}" if rest else f".{millis:03d}" if millis else ""
    return f"{text}@{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{fraction}Z"


class Every:
    """The multiples of `seconds` since 1970-01-01T00:00Z, each rounded to a microsecond.

    They are counted, not added up: none is ever skipped or doubled by rounding.

    :raises ConfigError: less than 0.01 s, more than 1e9 s, or not a number.
    """

    def __init__(self, name: str, seconds: float) -> None:
        fits = isinstance(seconds, int | float) and not isinstance(seconds, bool) and SHORTEST <= seconds <= LONGEST
        if not fits:
            raise ConfigError(f"every({seconds!r}): the number of seconds is from {SHORTEST:g} to {LONGEST:g}")
        self.name = name
        self.definition = f"every {float(seconds)!r} s"
        self._seconds = float(seconds)
        # As it is written: 0.1 is a tenth, though the float is not quite.
        self._micros, self._parts = (Fraction(repr(self._seconds)) * MICROSECONDS).as_integer_ratio()

    def instants(self, after: float, until: float, most: int) -> list[float]:
        newest = self._index(until)
        oldest = max(self._index(after), newest - most)
        return [self._instant(index) for index in range(oldest + 1, newest + 1)]

    def next(self, after: float) -> float:
        return self._instant(self._index(after) + 1)

    def _instant(self, index: int) -> float:
        return (2 * index * self._micros + self._parts) // (2 * self._parts) / MICROSECONDS

    def _index(self, moment: float) -> int:
        """Of the last instant that is not beyond a moment."""
        index = math.floor(moment / self._seconds)  # may be off by one
        while self._instant(index) > moment:
            index -= 1
        while self._instant(index + 1) <= moment:
            index += 1
        return index


class Cron:
    """The instants that a cron expression names in a time zone (`None`: UTC).

    Five fields, or six with the seconds first; names (`MON`, `JAN`), `L`, `LW`, `5L`, `MON#1` as cronsim
    reads them. Where clocks change it is as in Debian's cron: an expression of five fields whose minute
    and hour do not begin with `*` has each of its local times once a day, at the first of two, or where
    clocks leap over it at the end of the leap; any other has every moment whose local time matches.

    cronsim decides which local times match. Which instants those are is decided here, because its own
    way through a change of clocks depends on where it starts, and loses instants where the change is not
    by whole hours.

    :raises ConfigError: an expression that cannot be read or never matches; an unknown time zone (the near
        one is suggested).
    """

    def __init__(self, name: str, expression: str, timezone: str | None = None) -> None:
        self.name = name
        self._zone = _zone(timezone)
        self._expression = _checked(expression)
        self.definition = f"cron {self._expression!r} in {self._zone}"
        fields = self._expression.split()
        at_fixed_times = len(fields) == 5 and not fields[0].startswith("*") and not fields[1].startswith("*")
        self._walk = self._walk_once if at_fixed_times and self._zone is not UTC else self._walk_all
        if self.next(YEAR_2000) == math.inf:
            raise ConfigError(f"cron expression {expression!r}: it never matches")

    def instants(self, after: float, until: float, most: int) -> list[float]:
        backwards = itertools.takewhile(lambda instant: instant > after, self._walk(math.floor(until) + 1, -1))
        return [float(instant) for instant in itertools.islice(backwards, most)][::-1]

    def next(self, after: float) -> float:
        return float(next(self._walk(math.floor(after), 1), math.inf))

    def _walk_all(self, start: int, way: int) -> Iterator[int]:
        """Every second beyond `start` whose local time matches, forwards (1) or backwards (-1)."""
        here = start
        while abs(here - start) < FOREVER:
            offset = self._offset(here + way)
            for match in _matches(self._expression, here + offset, way):
                found = int(match.timestamp()) - offset  # if the offset is the same until there
                far = abs(found - here) > 3 * DAY
                change = self._change(offset, here, here + way * DAY if far else found)
                if change is not None:
                    here = change - way
                    break
                if far:  # nothing matches before the last days, whatever the offset is in between
                    here = found - way * 2 * DAY
                    break
                yield found
                here = found
            else:
                return

    def _walk_once(self, start: int, way: int) -> Iterator[int]:
        """For each matching local time one second beyond `start`, forwards (1) or backwards (-1)."""
        here = start
        for match in _matches(self._expression, start + self._offset(start) - way * FOLD, way):
            found = self._place(match)
            if (found - here) * way > 0:  # several that are leapt over end up at the same
                yield found
                here = found

    def _place(self, time: datetime) -> int:
        """The first moment of a local time; of one that does not exist, of the next whole minute that does."""
        local = time.replace(tzinfo=self._zone)
        while True:
            moment = int(local.timestamp())
            if datetime.fromtimestamp(moment, self._zone).replace(tzinfo=None) == local.replace(tzinfo=None):
                return moment
            local += timedelta(minutes=1)

    def _change(self, offset: int, start: int, end: int) -> int | None:
        """The first second beyond `start`, to `end`, with another offset than this; some days apart at most."""
        if self._offset(end) == offset:
            return None
        same, other = start, end
        while abs(other - same) > 1:
            middle = (same + other) // 2
            if self._offset(middle) == offset:
                same = middle
            else:
                other = middle
        return other

    def _offset(self, moment: int) -> int:
        if self._zone is UTC:
            return 0
        offset = datetime.fromtimestamp(moment, self._zone).utcoffset()
        assert offset is not None
        return round(offset.total_seconds())


def _matches(expression: str, local: int, way: int) -> CronSim:
    """The matching local times beyond one, each written as if it were UTC."""
    return CronSim(expression, datetime.fromtimestamp(local, UTC), reverse=way < 0)


def _checked(expression: Any) -> str:
    """An expression in its plain form."""
    if not isinstance(expression, str):
        raise ConfigError(f"cron({expression!r}): an expression is text, {SYNTAX}")
    fields = expression.upper().split()
    try:
        CronSim(expression, ANY_TIME)
        return " ".join(fields)
    except (CronSimError, ValueError) as error:
        why = f"{str(error)[:1].lower()}{str(error)[1:]} ({SYNTAX})"
        if "day-of-month" in str(error) and _reads([*fields[:-2], "*", *fields[-1:]]):
            why = "it never matches: no such day in these months"
    raise ConfigError(f"cron expression {expression!r}: {why}")


def _reads(fields: list[str]) -> bool:
    try:
        CronSim(" ".join(fields), ANY_TIME)
    except (CronSimError, ValueError):
        return False
    return True


def _zone(timezone: Any) -> tzinfo:
    if timezone is None or timezone == "UTC":
        return UTC
    try:
        return ZoneInfo(timezone)
    except (LookupError, ValueError, TypeError, OSError):
        known = available_timezones()
    hint = near(str(timezone), known) if known else ": this machine has no time zone data (pip install tzdata)"
    raise ConfigError(f"there is no time zone {timezone!r}{hint}")
