"""Schedules as the store knows them: of whatever app runs, and nothing is changed by looking."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from pathlib import Path

import msgspec
import pytest

from penstock.control.schedules import read, schedules
from penstock.stores import registry
from penstock.stores.base import Put, Store
from penstock.tasks.instants import Cron, Every, Schedule
from penstock.tasks.schedule import Scheduler, State, key
from tests.helpers import eventually


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = registry.connect(f"sqlite:///{tmp_path / 'schedules.db'}")
    await store.open()
    yield store
    await store.close()


@pytest.mark.parametrize(
    "schedule",
    [
        Every("x", 60),
        Every("x", 0.1),
        Every("x", 1e9),
        Cron("x", "*/5 * * * *"),
        Cron("x", "30 2 * * mon-fri", "Europe/Berlin"),
        Cron("x", "0 30 2 L * *", "Australia/Lord_Howe"),
    ],
)
def test_a_stored_definition_has_the_instants_of_the_declared_one(schedule: Schedule) -> None:
    again = read("x", schedule.definition)
    assert again is not None
    assert again.definition == schedule.definition
    for moment in (0.0, 1_790_000_000.25):
        assert again.next(moment) == schedule.next(moment)


async def test_schedules_of_a_running_app_are_told(store: Store) -> None:
    enqueued: list[float] = []

    async def enqueue(name: str, instants: Sequence[tuple[str, float]]) -> None:
        enqueued.extend(instant for _, instant in instants)

    running = asyncio.create_task(Scheduler([Every("often", 0.05), Cron("seldom", "0 0 1 1 *")], store, enqueue).run())
    try:
        await eventually(lambda: len(enqueued) > 2)
        often, seldom = await eventually(lambda: all_of(store, 2))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert (often.name, often.definition, seldom.name) == ("often", "every 0.05 s", "seldom")
    assert seldom.definition == "cron '0 0 1 1 *' in UTC"
    assert datetime.fromisoformat(often.last).timestamp() <= max(enqueued)
    assert datetime.fromisoformat(often.next) > datetime.fromisoformat(often.last)
    assert datetime.fromisoformat(seldom.next).utcoffset() is not None
    assert not often.overdue


async def all_of(store: Store, count: int) -> list[object] | None:
    found = await schedules(store)
    return list(found) if len(found) == count else None


async def test_a_schedule_that_nobody_looks_after_is_overdue(store: Store) -> None:
    now = 1_790_000_000.0
    for name, last in (("left", now - 600), ("kept", now - 61), ("ahead", now + 3600)):
        await store.apply([Put(key(name), msgspec.json.encode(State(Every(name, 60).definition, last)))])
    found = {one.name: one for one in await schedules(store, now)}
    assert {name: one.overdue for name, one in found.items()} == {"left": True, "kept": False, "ahead": False}
    assert datetime.fromisoformat(found["left"].next or "").timestamp() == Every("left", 60).next(now)


async def test_what_cannot_be_read_hides_nothing_else(store: Store) -> None:
    await store.apply(
        [
            Put(key("a"), b"nonsense"),
            Put(key("b"), msgspec.json.encode(State("when the moon is full", 1.0, claimed=(2.0,)))),
            Put(key("c"), msgspec.json.encode(State("every 1e99 s", 1e300))),
            Put(key("d"), msgspec.json.encode(State("every 60.0 s", 0.0))),
        ]
    )
    a, b, c, d = await schedules(store)
    assert a.definition.startswith("unreadable: ")
    assert (b.definition, b.next, b.enqueuing) == ("when the moon is full", None, 1)
    assert c.next is None
    assert d.next is not None


async def test_more_than_a_page_of_them_are_all_told(store: Store) -> None:
    state = msgspec.json.encode(State("every 60.0 s", 0.0))
    await store.apply([Put(key(f"s{number:04}"), state) for number in range(450)])
    assert [one.name for one in await schedules(store)] == [f"s{number:04}" for number in range(450)]
