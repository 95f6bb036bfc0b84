"""Each instant is enqueued, and only once, though processes die, stall, or lose store or broker."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from penstock.errors import BrokerUnavailable
from penstock.tasks.instants import Cron, Every, Schedule
from penstock.tasks.schedule import CATCH_UP
from penstock.testing.virtual import EPOCH
from tests.tasks.cluster import Process, World, down, play, virtual

# -- deaths


@virtual
async def test_what_a_dead_process_left_is_taken_over_in_ten_seconds(world: World) -> None:
    async def die(process: Process) -> None:
        process.die()

    world.start(Every("collect", 3600), name="dying", before_enqueue=die)
    await asyncio.sleep(0.1)
    first = world.loop.now
    world.start(Every("collect", 3600), name="other")
    instant = Every("collect", 3600).next(EPOCH)
    world.processes[1].ahead = -0.5  # comes second
    await world.until(instant - EPOCH + 15)
    assert first < 1
    assert [(round(when - instant) in (10, 11, 12), who) for when, instant, who in world.log] == [(True, "other")]


@pytest.mark.parametrize("seed", range(40))
def test_deaths_at_any_step_lose_nothing_and_double_only_what_the_dead_held(seed: int) -> None:
    async def main(world: World) -> None:
        rng = random.Random(seed)
        schedules: list[Schedule] = [Every("collect", 0.5), Every("collect", 7), Cron("collect", "*/20 * * * * *")]
        schedule = rng.choice(schedules)
        excused: set[float] = set()

        async def perhaps_die(process: Process) -> None:
            await asyncio.sleep(rng.choice([0.0, 0.0, 0.01, 1.0]))
            if world.loop.now < 300 and rng.random() < 0.03:
                process.die()

        def start() -> None:
            hooks = ["before_store", "after_store", "before_enqueue", "after_enqueue"]
            world.start(schedule, name=f"p{len(world.processes)}", **dict.fromkeys(hooks, perhaps_die))

        for _ in range(3):
            start()
        while world.loop.now < 400:
            await asyncio.sleep(rng.uniform(0, 5))
            for process in world.processes:
                if process.dead and process.holding:
                    excused |= process.holding
            if sum(not process.dead for process in world.processes) < 3 and rng.random() < 0.5:
                start()
        begun = schedule.next(EPOCH + 6)  # the first process may die before it has begun
        expected = set(schedule.instants(begun, EPOCH + 370, 10**6))
        for missed in expected - set(world.instants):  # one after another died with the claim before it
            assert min(when for when, instant, _ in world.log if instant > missed) - missed > CATCH_UP, seed
        assert world.doubled <= excused, seed
        if not any(process.dead for process in world.processes):
            assert not world.doubled

    play(main)


@virtual
async def test_a_slow_enqueue_is_not_taken_over(world: World) -> None:
    async def slow(process: Process) -> None:
        await asyncio.sleep(40)

    for _ in range(3):
        world.start(Every("collect", 600), before_enqueue=slow)
    await world.until(1800)
    assert len(world.log) == len(set(world.instants)) == 3


@virtual
async def test_an_enqueue_that_hangs_is_given_up_and_left_to_another(world: World) -> None:
    async def hang(process: Process) -> None:
        await asyncio.sleep(10**6)

    world.start(Every("collect", 1), name="stuck", before_enqueue=hang)
    await asyncio.sleep(1.5)
    world.start(Every("collect", 1), name="other")
    await world.until(300)
    assert not world.doubled
    assert set(range(1, 240)) <= set(world.since_epoch())  # each one, though late
    assert {who for _, _, who in world.log} == {"other"}
    assert all(when - instant < 2 for when, instant, _ in world.log if instant > EPOCH + 60)  # not in its way again


@virtual
async def test_a_process_that_stood_still_looks_again_before_it_enqueues(world: World) -> None:
    async def stand_still(process: Process) -> None:
        if process.holding and not world.log:
            await asyncio.sleep(30)  # while the others go on

    world.start(Every("collect", 60), name="still", after_store=stand_still)
    await asyncio.sleep(1)
    world.start(Every("collect", 60), name="other").ahead = -1.0
    await world.until(200)
    assert world.log[0][2] == "other"
    assert not world.doubled


@virtual
async def test_a_process_that_stood_still_past_its_claim_doubles_no_more_than_that(world: World) -> None:
    frozen: list[float] = []  # when it began

    async def freeze(process: Process) -> None:
        frozen[:] = frozen or [world.loop.now]

    async def wait(process: Process) -> None:
        if frozen:
            await asyncio.sleep(frozen[0] + 25 - world.loop.now)

    async def slow(process: Process) -> None:
        await asyncio.sleep(4)

    world.start(Every("collect", 5), name="still", after_enqueue=freeze, before_store=wait)
    world.start(Every("collect", 5), name="other", after_enqueue=slow).ahead = -0.1
    await world.until(100)
    assert world.log[0][2] == "still"
    assert world.doubled == {EPOCH + 5}
    assert set(range(5, 95, 5)) == {instant for instant in world.since_epoch() if instant < 95}


@virtual
async def test_a_stop_ends_what_is_under_way_first(world: World) -> None:
    async def slow(process: Process) -> None:
        await asyncio.sleep(2)

    process = world.start(Every("collect", 60), after_enqueue=slow)
    while not world.log:
        await asyncio.sleep(0.5)
    await process.stop()
    assert (await world.state()).claimed == ()
    world.start(Every("collect", 60))
    await world.until(200)
    assert not world.doubled


@virtual
async def test_a_stop_takes_no_longer_than_its_grace(world: World) -> None:
    async def hang(process: Process) -> None:
        await asyncio.sleep(10**6)

    process = world.start(Every("collect", 1), before_enqueue=hang)
    await asyncio.sleep(2)
    began = world.loop.now
    await process.stop()
    assert world.loop.now - began <= 5.1
    assert asyncio.all_tasks() == {asyncio.current_task()}


@virtual
async def test_a_second_cancel_does_not_wait(world: World) -> None:
    async def hang(process: Process) -> None:
        await asyncio.sleep(10**6)

    process = world.start(Every("collect", 1), before_enqueue=hang)
    await asyncio.sleep(2)
    began = world.loop.now
    process.task.cancel()
    await asyncio.sleep(0.01)
    await process.stop()
    await asyncio.sleep(0.01)
    assert world.loop.now - began < 1
    assert asyncio.all_tasks() == {asyncio.current_task()}


@virtual
async def test_an_error_that_is_no_outage_ends_the_run(world: World) -> None:
    async def fail(process: Process) -> None:
        raise ValueError("a mistake")

    process = world.start(Every("collect", 1), Every("other", 3600), before_enqueue=fail)
    with pytest.raises(ValueError, match="a mistake"):
        await process.task
    world.processes.clear()
    assert asyncio.all_tasks() == {asyncio.current_task()}


# -- outages


def test_each_failed_try_is_logged_and_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def main(world: World) -> None:
        processes = [world.start(Every("collect", 0.5)) for _ in range(3)]
        for attribute in ("before_store", "before_enqueue"):
            await asyncio.sleep(10)
            for process in processes:
                setattr(process, attribute, down)
            await asyncio.sleep(40)
            for process in processes:
                setattr(process, attribute, None)
        await asyncio.sleep(10)
        assert set(world.since_epoch()) >= {number / 2 for number in range(1, 215)}
        assert not world.doubled

    with caplog.at_level(logging.WARNING, "penstock.schedule"):
        play(main)
    lines = [record.getMessage() for record in caplog.records]
    assert all(line.startswith("schedule 'collect' failed, again in ") for line in lines)
    assert all(line.endswith("s: BrokerUnavailable: away") for line in lines)
    assert 30 < len(lines) < 400


@virtual
async def test_an_outage_longer_than_a_minute_is_a_pause(world: World) -> None:
    process = world.start(Every("collect", 10))
    await world.until(15)
    process.before_store = down
    await world.until(205)
    process.before_store = None
    await world.until(215)
    assert world.since_epoch() == [10, 140, 150, 160, 170, 180, 190, 200, 210]


@virtual
async def test_one_that_cannot_reach_the_broker_leaves_it_to_others_at_once(world: World) -> None:
    world.start(Every("collect", 60), name="cut off", before_enqueue=down)
    await asyncio.sleep(1)
    world.start(Every("collect", 60), name="other").ahead = -0.1
    await world.until(400)
    assert {who for _, _, who in world.log} == {"other"}
    assert not world.doubled
    assert all(when - instant < 5 for when, instant, _ in world.log)


@pytest.mark.parametrize("seed", range(20))
def test_store_calls_of_unknown_outcome_double_nothing(seed: int) -> None:
    async def main(world: World) -> None:
        rng = random.Random(seed)

        async def perhaps_fail(process: Process) -> None:
            await asyncio.sleep(rng.choice([0.0, 0.0, 0.01]))
            if rng.random() < 0.1:
                raise BrokerUnavailable("lost the connection")

        for _ in range(3):
            world.start(Every("collect", 1), before_store=perhaps_fail, after_store=perhaps_fail)
        await world.until(300)
        assert not world.doubled, seed
        assert set(range(1, 290)) <= set(world.since_epoch()), seed

    logging.disable(logging.CRITICAL)
    try:
        play(main)
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", range(60))
def test_stalls_and_failures_at_any_step_double_only_what_was_held_meanwhile(seed: int) -> None:
    async def main(world: World) -> None:
        rng = random.Random(seed)
        excused: set[float] = set()

        async def disturb(process: Process) -> None:
            if rng.random() < 0.03:
                excused.update(process.holding)
                await asyncio.sleep(rng.uniform(0, 25))
                excused.update(process.holding)

        async def disturb_store(process: Process) -> None:
            await disturb(process)
            if rng.random() < 0.03:
                raise BrokerUnavailable("lost the connection to the store")

        async def disturb_broker(process: Process) -> None:
            await disturb(process)
            if rng.random() < 0.05:
                excused.update(process.holding)
                raise BrokerUnavailable("lost the connection to the broker")

        hooks = ["before_store", "after_store", "before_enqueue", "after_enqueue"]
        disturbances = dict(zip(hooks, [disturb_store] * 2 + [disturb_broker] * 2, strict=True))
        for seconds in (5, 5, 3, 3) if seed % 2 else (5, 5, 5):
            world.start(Every("collect", seconds), name=f"{seed}", **disturbances)
            await asyncio.sleep(rng.uniform(0, 20))
        await world.until(3000)
        assert world.doubled <= excused, seed
        if seed % 2 == 0:
            missed = set(range(15, 2900, 5)) - set(world.since_epoch())
            assert len(missed) < 30, seed  # only where many stalls in a row lasted over a minute

    logging.disable(logging.CRITICAL)
    try:
        play(main)
    finally:
        logging.disable(logging.NOTSET)


@virtual
async def test_an_outage_of_the_store_makes_nobody_take_over(world: World) -> None:
    """The one with the claim could not say that it lives, and the others cannot hold that against it."""

    async def slow(process: Process) -> None:
        await asyncio.sleep(1.5)  # the others have seen the claim by now
        for other in world.processes:
            other.before_store = down
        await asyncio.sleep(20)
        for other in world.processes:
            other.before_store = None
        await asyncio.sleep(9)

    for _ in range(3):
        world.start(Every("collect", 300), before_enqueue=slow)
    await world.until(700)
    assert len(world.log) == len(set(world.instants)) == 2
