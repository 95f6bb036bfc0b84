"""Each instant is enqueued once in the cluster: what is due, what was missed, clocks and definitions."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

import pytest

from penstock.errors import ConfigError
from penstock.stores.base import Put
from penstock.stores.memory import MemoryStore
from penstock.tasks.instants import Cron, Every, Schedule
from penstock.tasks.schedule import CATCH_UP, MOST, Scheduler, key
from penstock.testing.virtual import EPOCH
from tests.tasks.cluster import Process, World, play, virtual

BERLIN = Cron("daily", "30 2 * * *", "Europe/Berlin")  # reads a file, which no event loop should wait for
TOKYO = Cron("daily", "0 3 * * *", "Asia/Tokyo")

# -- once


@virtual
async def test_three_processes_enqueue_each_of_a_thousand_instants_once(world: World) -> None:
    schedules: list[Schedule] = [Every("second", 1), Every("often", 0.05), Cron("minute", "* * * * *", None)]
    for _ in range(3):
        world.start(*schedules)
    await world.until(1000.5)
    expected = sorted(instant for schedule in schedules for instant in schedule.instants(EPOCH, EPOCH + 1000.2, 10**6))
    assert sorted(world.instants)[: len(expected)] == expected
    assert all(0 <= when - instant < 0.1 for when, instant, _ in world.log)
    assert len({who for _, _, who in world.log}) == 3  # whichever is the first


@virtual
async def test_processes_that_pause_between_any_two_steps_still_enqueue_once(world: World) -> None:
    rng = random.Random(3)

    async def dawdle(process: Process) -> None:
        await asyncio.sleep(rng.choice([0.0, 0.001, 0.3, 2.0]))

    for _ in range(4):
        world.start(
            Every("collect", 1),
            before_store=dawdle, after_store=dawdle, before_enqueue=dawdle, after_enqueue=dawdle,
        )  # fmt: skip
    await world.until(1000)
    assert not world.doubled
    assert set(range(1, 980)) <= set(world.since_epoch())


@virtual
async def test_nothing_before_the_first_start_counts(world: World) -> None:
    await world.until(100.5)
    world.start(Every("collect", 10))
    world.start(Every("collect", 10))
    await world.until(131)
    assert world.since_epoch() == [110, 120, 130]


@virtual
async def test_it_is_enqueued_at_its_instant_however_far_away_that_is(world: World) -> None:
    process = world.start(BERLIN)
    await world.until(3 * 86400)
    assert [when - instant < 0.05 for when, instant, _ in world.log] == [True] * 3
    assert process.looks < 3 * 86400 / 25  # at rest


# -- missed instants


def test_a_long_pause_enqueues_the_newest_and_the_last_minute(caplog: pytest.LogCaptureFixture) -> None:
    async def main(world: World) -> None:
        first = world.start(Every("collect", 7))
        await world.until(20)
        await first.stop()
        await world.until(3605)
        for _ in range(3):
            world.start(Every("collect", 7))
        await world.until(3605.5)
        every, horizon = Every("collect", 7), EPOCH + 3605 - CATCH_UP
        expected = every.instants(EPOCH, horizon, 1) + every.instants(horizon, EPOCH + 3605, 100)
        assert [one for one in world.instants if one > EPOCH + 20] == expected

    with caplog.at_level(logging.WARNING, "penstock.schedule"):
        play(main)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == "schedule 'collect': skipped 503 instants missed by over 60 s"


@virtual
async def test_a_daily_instant_missed_by_hours_comes_once(world: World) -> None:
    process = world.start(TOKYO)
    await world.until(86400 * 1.5)
    await process.stop()
    world.log.clear()
    await world.until(86400 * 5)
    world.start(TOKYO)
    world.start(TOKYO)
    await world.until(86400 * 5 + 60)
    assert world.instants == [TOKYO.instants(EPOCH, EPOCH + 86400 * 5, 1)[0]]


@virtual
async def test_a_short_restart_loses_none_of_twenty_a_second(world: World) -> None:
    process = world.start(Every("collect", 0.05))
    await world.until(10)
    await process.stop()
    await world.until(60)
    world.start(Every("collect", 0.05))
    world.start(Every("collect", 0.05))
    await world.until(70)
    assert world.instants[: 69 * 20] == Every("collect", 0.05).instants(EPOCH, EPOCH + 69, 10**6)
    assert not world.doubled
    assert max(world.calls) <= MOST
    assert sum(world.calls) - max(world.calls) < 70 * 20


@virtual
async def test_a_claim_is_bounded_and_the_rest_follows_at_once(world: World) -> None:
    process = world.start(Every("collect", 0.01))
    await world.until(1)
    await process.stop()
    world.calls.clear()
    await world.until(50)
    world.start(Every("collect", 0.01))
    await world.until(50.1)
    assert world.calls[:4] == [1000] * 4
    assert world.instants[:4900] == Every("collect", 0.01).instants(EPOCH, EPOCH + 49.0, 10**6)


@virtual
async def test_a_blocked_loop_loses_none(world: World) -> None:
    world.start(Every("collect", 0.5))
    await world.until(10)
    world.loop.now += 45  # nothing could run meanwhile
    await world.until(60)
    assert world.instants == Every("collect", 0.5).instants(EPOCH, world.instants[-1], 10**6)
    assert world.instants[-1] >= EPOCH + 59.5


# -- clocks that are set


@virtual
async def test_a_clock_put_back_enqueues_nothing_again(world: World) -> None:
    processes = [world.start(Every("collect", 60)) for _ in range(3)]
    await world.until(1000)
    before = len(world.log)
    for process in processes:
        process.ahead = -3600
    await world.until(4500)
    assert len(world.log) == before
    await world.until(5000)
    assert len(world.log) > before
    assert not world.doubled
    assert sorted(world.instants) == Every("collect", 60).instants(EPOCH, max(world.instants), 10**6)


@virtual
async def test_a_clock_put_forward_is_a_pause_seen_within_half_a_minute(world: World) -> None:
    process = world.start(Every("collect", 600))
    await world.until(1000)
    process.ahead = 3600 * 5 + 70
    before = len(world.log)
    await world.until(1031)
    assert world.instants[before:] == Every("collect", 600).instants(EPOCH, process.time(), 1)


@virtual
async def test_one_clock_of_three_that_is_wrong_doubles_nothing(world: World) -> None:
    processes = [world.start(Every("collect", 10)) for _ in range(3)]
    for ahead in (3600, -3600, 0, 25, -25, 0):
        processes[1].ahead = ahead
        await asyncio.sleep(2000)
    assert not world.doubled


@virtual
async def test_a_last_instant_of_a_clock_days_ahead_is_not_believed(world: World) -> None:
    process = world.start(Every("collect", 60))
    await world.until(100)
    process.ahead = 365 * 86400
    await world.until(200)
    process.ahead = 0
    await world.until(500)
    recent = [instant for instant in world.instants if EPOCH + 240 < instant < EPOCH + 500]
    assert recent == Every("collect", 60).instants(EPOCH + 240, EPOCH + 500, 100)


# -- definitions


@virtual
async def test_a_changed_definition_begins_anew(world: World) -> None:
    process = world.start(Every("collect", 7))
    await world.until(30)
    await process.stop()
    await world.until(500)
    world.start(Every("collect", 50))
    await world.until(620)
    assert world.since_epoch()[-2:] == [550, 600]
    assert not [instant for instant in world.since_epoch() if 30 < instant < 550]


@virtual
async def test_the_definition_that_started_last_holds_while_both_run(world: World) -> None:
    old = [world.start(Every("collect", 60), name="old") for _ in range(2)]
    await world.until(1000)
    new = [world.start(Every("collect", 45), name="new") for _ in range(2)]
    await world.until(9_991)
    later = [(instant, who) for _, instant, who in world.log if instant > EPOCH + 1060]
    assert {who for _, who in later} == {"new"}
    assert [instant for instant, _ in later] == Every("collect", 45).instants(EPOCH + 1060, EPOCH + 9_990, 10**6)
    assert not world.doubled
    assert sum(process.writes for process in old) < 2 * 16 + 9000 / 25  # they ask now and then
    assert sum(process.writes for process in new) < 2 * 200 + 9000 / 25


@virtual
async def test_a_definition_whose_processes_are_gone_is_taken_back(world: World) -> None:
    world.start(Cron("collect", "0 * * * *"), name="old")
    await world.until(100)
    new = world.start(Every("collect", 40), name="new")
    await world.until(200)
    await new.stop()
    await world.until(400)
    assert (await world.state()).definition == Cron("collect", "0 * * * *").definition
    world.log.clear()
    await world.until(4000)
    assert [who for _, _, who in world.log] == ["old"]


@virtual
async def test_a_quiet_definition_whose_processes_live_is_not_taken_back(world: World) -> None:
    world.start(Every("collect", 60), name="old")
    await world.until(100)
    world.start(Cron("collect", "0 0 1 1 *"), name="new")
    world.start(Cron("collect", "0 0 1 1 *"), name="new")
    await world.until(20_000)
    assert (await world.state()).definition == Cron("collect", "0 0 1 1 *").definition
    assert not [instant for instant in world.instants if instant > EPOCH + 130]


@virtual
async def test_a_rolling_deploy_with_a_crash_ends_with_the_new_definition(world: World) -> None:
    old = [world.start(Every("collect", 60), name="old") for _ in range(2)]
    await world.until(300)
    world.start(Every("collect", 45), name="new")
    await old[0].stop()
    await world.until(330)
    old[1].die()
    old[1] = world.start(Every("collect", 60), name="old")  # started again, so it started last
    await world.until(345)
    world.start(Every("collect", 45), name="new")
    await old[1].stop()
    await world.until(2000)
    assert not world.doubled
    later = [instant for instant in world.instants if instant > EPOCH + 500]
    assert later == Every("collect", 45).instants(EPOCH + 500, EPOCH + 2000, 100)


@virtual
async def test_a_new_definition_enqueues_what_a_dead_process_of_the_old_one_claimed(world: World) -> None:
    async def die(process: Process) -> None:
        process.die()

    world.start(Every("collect", 60), name="old", before_enqueue=die)
    await world.until(70)
    instant = (await world.state()).claimed
    world.start(Every("collect", 45), name="new")
    await world.until(90)
    assert world.instants[:1] == list(instant)
    assert (await world.state()).definition == Every("collect", 45).definition


@virtual
async def test_what_two_definitions_have_in_common_is_not_enqueued_twice(world: World) -> None:
    world.start(Every("collect", 10)).ahead = 8
    await world.until(104)
    assert world.since_epoch()[-1] == 110
    world.start(Every("collect", 5))  # its clock is right, so 105 and 110 are to come
    await world.until(200)
    assert not world.doubled


def test_what_cannot_be_read_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    async def main(world: World) -> None:
        world.server.apply([Put(key("collect"), b"\xff{")])
        world.start(Every("collect", 10))
        await world.until(25)
        assert world.since_epoch() == [10, 20]

    play(main)
    assert "what was stored cannot be read" in caplog.text


@virtual
async def test_no_schedules_no_run(world: World) -> None:
    await world.start().task
    world.processes.clear()


def test_one_task_has_one_schedule() -> None:
    async def nowhere(name: str, due: Sequence[tuple[str, float]]) -> None: ...

    with pytest.raises(ConfigError, match="task 'collect' has more than one schedule"):
        Scheduler([Every("collect", 5), Cron("collect", "* * * * *")], MemoryStore(), nowhere)
