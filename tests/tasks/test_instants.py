"""When schedules are due: the same in every process, whatever clocks do."""

from __future__ import annotations

import itertools
import random
import string
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim

from penstock.errors import ConfigError
from penstock.tasks.instants import Cron, Every, Schedule, instant_id

NOW = datetime(2026, 11, 21, 6, 40, 0, 123456, tzinfo=UTC).timestamp()
FAR = 10**6


def at(text: str) -> float:
    """UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def by_next(schedule: Schedule, after: float, until: float) -> list[float]:
    """The instants found one by one."""
    found = [after]
    while (following := schedule.next(found[-1])) <= until:
        assert following > found[-1]
        found.append(following)
    return found[1:]


# -- ids


@pytest.mark.parametrize(
    ("instant", "expected"),
    [
        ("2026-11-21T06:40:00", "collect@2026-11-21T06:40:00Z"),
        ("2026-11-21T06:40:00.25", "collect@2026-11-21T06:40:00.250Z"),
        ("2026-11-21T06:40:00.250001", "collect@2026-11-21T06:40:00.250001Z"),
        ("2026-11-21T06:40:59.999999", "collect@2026-11-21T06:40:59.999999Z"),
    ],
)
def test_an_id_says_name_and_instant(instant: str, expected: str) -> None:
    assert instant_id("collect", at(instant)) == expected


def test_ids_are_safe_in_keys_short_and_distinct() -> None:
    safe = set(string.ascii_letters + string.digits + "_.-~%@:")
    names = ["crew.example.test", "asgard/counts", "a b", "a%20b", "收集", "x" * 255, "x" * 254 + "y", "é" * 200]
    ids = [instant_id(name, NOW) for name in names]
    assert len(set(ids)) == len(names)
    assert all(set(one) <= safe and len(one) <= 220 for one in ids)


# -- every


@pytest.mark.parametrize("seconds", [0.01, 0.05, 0.1, 0.3, 1 / 3, 1, 7.77, 60, 3600.5, 86400, 1e8])
def test_no_instant_of_every_is_skipped_or_doubled_wherever_one_starts(seconds: float) -> None:
    schedule = Every("collect", seconds)
    rng = random.Random(5)
    start = NOW - rng.uniform(0, seconds)
    whole = schedule.instants(start, start + 500 * seconds, FAR)
    assert len(whole) in (500, 501)
    assert all(abs(two - one - seconds) < 3e-6 for one, two in itertools.pairwise(whole))
    assert by_next(schedule, start, start + 500 * seconds) == whole
    cuts = sorted(rng.uniform(start, start + 500 * seconds) for _ in range(40))
    cuts = sorted([*cuts, *rng.sample(whole, 40)])  # also at an instant itself
    pieces = [schedule.instants(one, two, FAR) for one, two in itertools.pairwise([start, *cuts, whole[-1]])]
    assert list(itertools.chain(*pieces)) == whole
    assert len({instant_id("collect", instant) for instant in whole}) == len(whole)


def test_every_is_aligned_to_its_multiples() -> None:
    assert Every("x", 3600).instants(at("2026-03-29T00:30"), at("2026-03-29T02:00"), FAR) == [
        at("2026-03-29T01:00"),
        at("2026-03-29T02:00"),
    ]
    assert Every("x", 86400).next(NOW) == at("2026-11-22T00:00")
    ids = [instant_id("x", one) for one in Every("x", 0.1).instants(NOW, NOW + 0.3, FAR)]
    assert [one[-7:] for one in ids] == ["00.200Z", "00.300Z", "00.400Z"]


def test_the_last_of_many_instants_are_given() -> None:
    for schedule in (Every("x", 0.01), Cron("x", "* * * * * *"), Cron("x", "1 1 * * *", "Europe/Berlin")):
        year = schedule.instants(NOW - 365 * 86400, NOW, 300)
        assert len(year) == 300
        assert year == schedule.instants(year[0] - 0.001, NOW, FAR)
        assert schedule.instants(NOW - 365 * 86400, NOW, 0) == schedule.instants(NOW, NOW, 5) == []


@pytest.mark.parametrize("seconds", [0, -1, 0.009, float("nan"), float("inf"), 1e10, "60", None, True])
def test_every_refuses_what_is_no_period(seconds: Any) -> None:
    with pytest.raises(ConfigError, match=r"^every\(.*from 0.01 to 1e\+09$"):
        Every("x", seconds)


# -- cron at the changes of clocks: local time → UTC, as in docs/schedules.md

SPRING, AUTUMN = "2026-03-29", "2026-10-25"  # Berlin: 02:00 → 03:00 at 01:00 UTC; 03:00 → 02:00 at 01:00 UTC
SPRING_NY, AUTUMN_NY = "2026-03-08", "2026-11-01"  # New York: 02:00 → 03:00 at 07:00; 02:00 → 01:00 at 06:00
SPRING_LH, AUTUMN_LH = "2026-10-03", "2026-04-04"  # Lord Howe: 02:00 → 02:30 at 15:30; 02:00 → 01:30 at 15:00


@pytest.mark.parametrize(
    ("zone", "expression", "day", "hours", "expected"),
    [
        # A fixed time that is leapt over comes at the end of the leap, several of them come once.
        ("Europe/Berlin", "30 2 * * *", SPRING, "00:00-23:00", "01:00"),
        ("Europe/Berlin", "0,30 2 * * *", SPRING, "00:00-23:00", "01:00"),
        ("Europe/Berlin", "0 2,3 * * *", SPRING, "00:00-23:00", "01:00"),
        ("Europe/Berlin", "15 3 * * *", SPRING, "00:00-23:00", "01:15"),
        ("America/New_York", "30 2 * * *", SPRING_NY, "00:00-23:00", "07:00"),
        ("Australia/Lord_Howe", "15 2 * * *", SPRING_LH, "00:00-23:00", "15:30"),
        # One that comes twice counts the first time.
        ("Europe/Berlin", "30 2 * * *", AUTUMN, "00:00-23:00", "00:30"),
        ("Europe/Berlin", "30 2 * * *", AUTUMN, "01:10-23:00", ""),
        ("Europe/Berlin", "0 2,3 * * *", AUTUMN, "00:00-23:00", "02:00"),
        ("America/New_York", "30 1 * * *", AUTUMN_NY, "00:00-23:00", "05:30"),
        ("Australia/Lord_Howe", "45 1 * * *", AUTUMN_LH, "00:00-23:00", "14:45"),
        # A wildcard in minute or hour: each moment whose local time matches, be it none or two.
        ("Europe/Berlin", "*/30 * * * *", SPRING, "00:00-02:00", "00:30 01:00 01:30 02:00"),
        ("Europe/Berlin", "*/30 * * * *", AUTUMN, "00:00-02:00", "00:30 01:00 01:30 02:00"),
        ("Europe/Berlin", "0 * * * *", AUTUMN, "00:00-03:00", "01:00 02:00 03:00"),
        ("Europe/Berlin", "*/30 2 * * *", SPRING, "00:00-23:00", ""),
        ("Europe/Berlin", "*/30 2 * * *", AUTUMN, "00:00-23:00", "00:30 01:00 01:30"),
        ("Europe/Berlin", "30 */2 * * *", AUTUMN, "00:00-04:00", "00:30 01:30 03:30"),
        ("America/New_York", "*/30 * * * *", SPRING_NY, "06:00-07:30", "06:30 07:00 07:30"),
        ("America/New_York", "*/30 1 * * *", AUTUMN_NY, "00:00-23:00", "05:00 05:30 06:00 06:30"),
        ("Australia/Lord_Howe", "45 * * * *", SPRING_LH, "15:00-17:00", "15:15 15:45 16:45"),
        ("Australia/Lord_Howe", "45 * * * *", AUTUMN_LH, "14:00-17:00", "14:45 15:15 16:15"),
        ("Australia/Lord_Howe", "*/30 2 * * *", AUTUMN_LH, "14:00-17:00", "15:30 16:00"),
        # So does one with seconds.
        ("Europe/Berlin", "0 30 2 * * *", SPRING, "00:00-23:00", ""),
        ("Europe/Berlin", "0 30 2 * * *", AUTUMN, "00:00-23:00", "00:30 01:30"),
        # Where nothing changes.
        ("Asia/Tokyo", "30 2 * * *", SPRING, "00:00-23:00", "17:30"),
        ("Asia/Tokyo", "*/30 * * * *", AUTUMN, "00:00-01:30", "00:30 01:00 01:30"),
        (None, "30 2 * * *", SPRING, "00:00-23:00", "02:30"),
    ],
)
def test_cron_at_a_change_of_clocks(zone: str | None, expression: str, day: str, hours: str, expected: str) -> None:
    schedule = Cron("x", expression, zone)
    after, until = (at(f"{day}T{hour}") for hour in hours.split("-"))
    found = schedule.instants(after, until, FAR)
    assert " ".join(f"{datetime.fromtimestamp(one, UTC):%H:%M}" for one in found) == expected
    assert by_next(schedule, after, until) == found


CHANGES = {
    "Europe/Berlin": ["2026-03-29", "2026-10-25"],
    "America/New_York": ["2026-03-08", "2026-11-01"],
    "Australia/Lord_Howe": ["2026-04-05", "2026-10-04"],
    "America/Santiago": ["2026-04-05", "2026-09-06"],  # at midnight
    "Antarctica/Troll": ["2026-03-29", "2026-10-25"],  # by two hours
    "Europe/Dublin": ["2026-03-29", "2026-10-25"],
    "Asia/Tokyo": ["2026-03-29"],
}
MINUTES = ["*", "*/7", "*/30", "0", "30", "45", "15", "0,30", "10-50/20", "59"]
HOURS = ["*", "*", "*/2", "2", "0-3", "1,2", "0", "23", "3"]


def matching(expression: str, zone: ZoneInfo, after: int, until: int) -> list[float]:
    """Every minute whose local time matches, by looking at each."""
    found = []
    for moment in range(after // 60 * 60 + 60, until + 1, 60):
        local = datetime.fromtimestamp(moment, zone).replace(tzinfo=UTC)
        if next(CronSim(expression, local - timedelta(seconds=1))) == local:
            found.append(float(moment))
    return found


def by_cronsim(expression: str, zone: ZoneInfo, after: int, until: int) -> list[float]:
    """Those that cronsim finds, where it knows the zone."""
    found = [float(after)]
    for match in CronSim(expression, datetime.fromtimestamp(after, zone)):
        if match.timestamp() > until:
            break
        if match.timestamp() > found[-1]:
            found.append(match.timestamp())
    return found[1:]


@pytest.mark.parametrize("zone", CHANGES)
def test_cron_finds_the_same_instants_from_anywhere(zone: str) -> None:
    rng = random.Random(zone)
    for _ in range(25):
        day = rng.choice(CHANGES[zone])
        days, weekdays = rng.choice(["*", "*", str(int(day[-2:])), "*/2"]), rng.choice(["*", "*", "0", "6,0"])
        expression = f"{rng.choice(MINUTES)} {rng.choice(HOURS)} {days} * {weekdays}"
        after = int(at(day)) - rng.randrange(86400)
        until = after + rng.randrange(3600, 2 * 86400)
        schedule = Cron("x", expression, zone)
        found = schedule.instants(after, until, FAR)
        assert by_next(schedule, after, until) == found, expression
        cuts = sorted(rng.uniform(after, until) for _ in range(5))
        pieces = [schedule.instants(one, two, FAR) for one, two in itertools.pairwise([after, *cuts, until])]
        assert list(itertools.chain(*pieces)) == found, expression
        wild = expression.split()[0].startswith("*") or expression.split()[1].startswith("*")
        expected = matching if wild else by_cronsim
        assert found == expected(expression, ZoneInfo(zone), after, until), expression


def test_rare_instants_are_found_at_once_and_right() -> None:
    zone = "Europe/Berlin"
    assert Cron("x", "*/10 * 29 2 *", zone).next(at("2026-03-01")) == at("2028-02-28T23:00")
    assert Cron("x", "* * * 2 MON#5", zone).next(at("2026-03-01")) == at("2044-02-28T23:00")
    assert Cron("x", "*/20 4 1 1 *", zone).instants(at("2026-03-01"), at("2031-03-01"), 2) == [
        at("2031-01-01T03:20"),
        at("2031-01-01T03:40"),
    ]


def test_cron_takes_seconds_and_names() -> None:
    assert Cron("x", "*/20 * * * * *").instants(NOW, NOW + 60, FAR) == [
        at("2026-11-21T06:40:20"),
        at("2026-11-21T06:40:40"),
        at("2026-11-21T06:41:00"),
    ]
    assert Cron("x", "0 9 LW jan-dec *", "Asia/Tokyo").next(NOW) == at("2026-11-30T00:00")
    assert Cron("x", "0 9 * * mon#1", "Asia/Tokyo").next(NOW) == at("2026-12-07T00:00")


def test_the_same_instants_have_the_same_definition() -> None:
    assert Every("x", 60).definition == Every("y", 60.0).definition != Every("x", 61).definition
    assert Cron("x", "*/5 * * * mon").definition == Cron("x", " */5  * * * MON", "UTC").definition
    assert Cron("x", "*/5 * * * *").definition != Cron("x", "*/5 * * * *", "Asia/Tokyo").definition


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("60 * * * *", "bad minute"),
        ("* 24 * * *", "bad hour"),
        ("* * 32 * *", "bad day-of-month"),
        ("* * 30 13 *", "bad month"),
        ("* * * * L", "bad day-of-week"),
        ("*/0 * * * *", "bad minute"),
        ("* * * *", "wrong number of fields"),
        ("", "wrong number of fields"),
        ("@daily", "wrong number of fields"),
        ("9" * 5000 + " * * * *", ""),
        ("0 0 30 2 *", "it never matches: no such day in these months"),
        ("0 0 31 4,6 *", "it never matches: no such day in these months"),
        ("0 0 */29 2 1#5", "it never matches"),
        (5, "an expression is text"),
        (None, "an expression is text"),
    ],
)
def test_cron_refuses_an_expression_in_one_line(expression: Any, why: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Cron("x", expression)
    assert why in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_cron_refuses_what_is_always_leapt_over() -> None:
    with pytest.raises(ConfigError, match="it never matches"):
        Cron("x", "*/30 2 * 3 0L", "Europe/Berlin")
    assert Cron("x", "30 2 * 3 0L", "Europe/Berlin").next(at("2026-01-01")) == at("2026-03-29T01:00")


@pytest.mark.parametrize("zone", ["Asia/Tokio", "", "Mars/Olympus", "../etc/passwd", "/etc/passwd", "a\0b", 9])
def test_cron_refuses_an_unknown_zone(zone: Any) -> None:
    with pytest.raises(ConfigError, match=r"^there is no time zone"):
        Cron("x", "* * * * *", zone)


def test_the_near_zone_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"'Asia/Tokio' \(did you mean 'Asia/Tokyo'\?\)$"):
        Cron("x", "* * * * *", "Asia/Tokio")


def test_a_machine_without_zones_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.tasks.instants.available_timezones", set)
    with pytest.raises(ConfigError, match="pip install tzdata"):
        Cron("x", "* * * * *", "Mars/Olympus")
    assert Cron("x", "* * * * *", "UTC").next(0) == 60
