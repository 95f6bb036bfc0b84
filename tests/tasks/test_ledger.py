"""The ledger: who may begin and end a run, and for how long what is known."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest

from penstock import terms
from penstock.clock import SystemClock
from penstock.errors import NotUnique, UnknownTask
from penstock.stores import records
from penstock.stores.base import Delete, Put
from penstock.stores.ledger import Ledger
from penstock.stores.memory import MemoryStore, MemoryStoreServer
from penstock.stores.records import Body, Sent
from penstock.terms import Terms
from tests.helpers import eventually

DAY = 86_400.0
PLAIN = Terms(recorded=True)


class Clock(SystemClock):
    """The machine's, put forward at will."""

    ahead = 0.0

    def time(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    return Ledger(MemoryStore(server=MemoryStoreServer(clock)), clock, worker="here")


def sent(asked: Terms = PLAIN, topic: str = "work", **more: Any) -> Sent:
    content = Body(b"1", {terms.HEADER: terms.write(asked)})
    return Sent(topic, content, time.time(), None, ["work"], asked.result_ttl, **more)


async def state(ledger: Ledger, taskid: str = "id") -> str:
    return str((await ledger.record(taskid)).state)


async def test_of_two_deliveries_the_later_one_is_heard(ledger: Ledger) -> None:
    await ledger.send("id", sent())
    paused = await ledger.begin("id", "work", PLAIN, 1)
    alive = await ledger.begin("id", "work", PLAIN, 2)
    assert (await ledger.finish(paused, "succeeded", PLAIN, result=Body(b"1", {}))).state == "running"
    assert (await ledger.begin("id", "work", PLAIN, 1)).over
    assert await ledger.wants_cancel(paused)
    assert not await ledger.wants_cancel(alive)
    assert (await ledger.finish(alive, "succeeded", PLAIN, result=Body(b"2", {}))).state == "succeeded"
    (run,) = (await ledger.record("id")).runs
    assert run.result == 2
    assert [attempt.outcome for attempt in run.attempts] == ["lost", "succeeded"]


async def test_of_two_copies_the_first_end_counts(ledger: Ledger) -> None:
    await ledger.send("id", sent())
    one, other = await ledger.begin("id", "work", PLAIN, 1), await ledger.begin("id", "work", PLAIN, 1)
    assert (await ledger.finish(one, "succeeded", PLAIN, result=Body(b"1", {}))).state == "succeeded"
    assert (await ledger.finish(other, "failed", PLAIN, line="late")).state == "succeeded"
    (run,) = (await ledger.record("id")).runs
    assert [attempt.outcome for attempt in run.attempts] == ["succeeded", "lost"]


@pytest.mark.parametrize("ttl", [0.0, 1.0, 1000.0])
async def test_an_end_that_is_refused_starts_no_clock(ledger: Ledger, clock: Clock, ttl: float) -> None:
    asked = Terms(recorded=True, result_ttl=ttl)
    await ledger.send("id", sent(asked))
    paused = await ledger.begin("id", "work", asked, 1)
    alive = await ledger.begin("id", "work", asked, 2)
    await ledger.finish(paused, "failed", asked, line="late")
    clock.ahead += DAY
    assert await state(ledger) == "running"
    await ledger.finish(alive, "succeeded", asked, result=Body(b"2", {}))
    clock.ahead += ttl + 1
    with pytest.raises(UnknownTask):
        await ledger.record("id")


async def test_what_is_cancelled_before_it_is_begun_stays_so_until_its_message_comes(
    ledger: Ledger, clock: Clock
) -> None:
    asked = Terms(recorded=True, result_ttl=0.0)
    await ledger.send("id", sent(asked, due_at=time.time() + 100 * DAY))
    assert await ledger.cancel("id")
    clock.ahead += 101 * DAY
    assert (await ledger.begin("id", "work", asked)).over


async def test_what_is_cancelled_and_had_no_runs_is_remembered_for_its_time(ledger: Ledger, clock: Clock) -> None:
    asked = Terms(recorded=True, result_ttl=10.0, unique="unique/nobody/k")
    await ledger.reserve("unique/nobody/k", "id")
    nowhere = msgspec.structs.replace(sent(asked, "nobody"), queues=[], expires_at=time.time() + 100 * DAY)
    await ledger.send("id", nowhere)
    waiting = asyncio.create_task(ledger.wait("id"))
    await eventually(lambda: ledger.followers._bells)
    assert await ledger.cancel("id")
    assert (await waiting).state == "cancelled"
    await ledger.reserve("unique/nobody/k", "other")
    assert [one.state for one in await ledger.page(10)] == ["cancelled"]
    clock.ahead += 11
    with pytest.raises(UnknownTask):
        await ledger.record("id")


async def test_a_task_that_runs_after_the_store_was_emptied_is_heard_of(ledger: Ledger) -> None:
    await ledger.topics.register("work", ["news"])
    await ledger.store.apply([Delete("topic/work"), Delete("topic/news")])
    elsewhere = Ledger(ledger.store)
    assert await elsewhere.topics.queues("news") == []
    await elsewhere.send("id", msgspec.structs.replace(sent(topic="news"), queues=[]))
    waiting = asyncio.create_task(elsewhere.wait("id"))
    ledger.topics._known.clear()  # what it remembers for a second
    await ledger.finish(await ledger.begin("id", "work", PLAIN), "succeeded", PLAIN)
    assert (await waiting).state == "succeeded"
    assert await Ledger(ledger.store).topics.queues("news") == ["work"]


async def test_a_dead_letter_is_revived_once(ledger: Ledger) -> None:
    await ledger.send("id", sent())
    await ledger.finish(await ledger.begin("id", "work", PLAIN, 3), "failed", PLAIN, line="first")
    again = terms.replace(PLAIN, again=time.time())
    held = await ledger.begin("id", "work", again, 1)
    assert not held.over
    await ledger.requeue(held, "second")
    assert await ledger.cancel("id")
    assert (await ledger.begin("id", "work", again, 2)).over
    assert await state(ledger) == "cancelled"
    later = terms.replace(PLAIN, again=time.time() + 1)
    assert not (await ledger.begin("id", "work", later, 1)).over


async def test_what_is_revived_is_remembered_while_it_runs(ledger: Ledger, clock: Clock) -> None:
    await ledger.send("id", sent())
    await ledger.finish(await ledger.begin("id", "work", PLAIN), "failed", PLAIN, line="first")
    held = await ledger.begin("id", "work", terms.replace(PLAIN, again=time.time()))
    clock.ahead += 2 * DAY
    assert await state(ledger) == "running"
    await ledger.finish(held, "succeeded", PLAIN)
    assert await state(ledger) == "succeeded"


async def test_unique_keys_of_different_topics_are_different(ledger: Ledger) -> None:
    keys = {terms.unique_key("a", "b/c"), terms.unique_key("a/b", "c"), terms.unique_key("", "a/b/c")}
    assert len(keys) == 3
    for number, key in enumerate(keys):
        await ledger.reserve(key, str(number))


async def test_a_task_that_is_retried_takes_its_unique_key_again(ledger: Ledger) -> None:
    key = terms.unique_key("work", "report/7")
    asked = Terms(recorded=True, unique=key)

    async def fail(taskid: str) -> None:
        await ledger.send(taskid, sent(asked))
        await ledger.reserve(key, taskid)
        await ledger.finish(await ledger.begin(taskid, "work", asked), "failed", asked, line="no")

    await fail("one")
    await ledger.send("two", sent(asked))
    await ledger.reserve(key, "two")
    with pytest.raises(NotUnique, match="'report/7' belongs to task two"):
        await ledger.revive("one")
    assert await state(ledger, "one") == "failed"
    with pytest.raises(NotUnique):
        await ledger.begin("one", "work", terms.replace(asked, again=time.time()))
    await ledger.finish(await ledger.begin("two", "work", asked), "succeeded", asked)
    await ledger.revive("one")
    with pytest.raises(NotUnique):
        await ledger.reserve(key, "three")


async def test_the_end_of_the_last_of_several_runs_frees_the_unique_key(ledger: Ledger) -> None:
    key = terms.unique_key("both", "k")
    asked = Terms(recorded=True, unique=key, runs=2, result_ttl=0.0)
    await ledger.send("id", Sent("both", Body(b"1", {}), time.time(), None, ["a", "b"]))
    await ledger.reserve(key, "id")
    for queue in ("a", "b"):
        with pytest.raises(NotUnique):
            await ledger.reserve(key, "other")
        await ledger.finish(await ledger.begin("id", queue, asked), "succeeded", asked)
    await ledger.reserve(key, "other")


async def test_whoever_finds_a_run_ended_does_what_its_end_entails(ledger: Ledger) -> None:
    key = terms.unique_key("work", "k")
    asked = Terms(recorded=True, unique=key)
    await ledger.send("id", sent(asked))
    await ledger.reserve(key, "id")
    held = await ledger.begin("id", "work", asked)
    held.state.end(held.attempt, "succeeded", time.time(), None)
    await ledger.store.apply([Put("run/id/work", records.encode(held.state))])  # and then it died
    assert (await ledger.begin("id", "work", asked, 2)).over
    assert await ledger.store.get([key]) == [None]


async def test_what_cannot_be_read_has_failed_and_hides_nothing(ledger: Ledger) -> None:
    for taskid in ("one", "two"):
        await ledger.send(taskid, sent())
    await ledger.store.apply([Put("run/one/work", b"\x93not ours")])
    assert [record.state for record in await ledger.page(10)] == ["queued", "failed"]
    assert (await ledger.begin("one", "work", PLAIN)).over


async def test_a_time_that_no_calendar_holds_is_shown_as_its_end(ledger: Ledger) -> None:
    await ledger.send("id", Sent("work", Body(b"1", {}), 1e300, 1e18, ["work"]))
    record = await ledger.record("id")
    assert record.createdAt.startswith("9999-12-31")
    assert record.expiresAt is not None


async def test_several_who_look_at_an_expired_task_agree(ledger: Ledger) -> None:
    await ledger.send("id", Sent("work", Body(b"1", {}), time.time(), time.time() - 5, ["work"]))
    looks = await asyncio.gather(*(ledger.record("id") for _ in range(5)))
    assert {record.state for record in looks} == {"expired"}
    assert (await ledger.begin("id", "work", PLAIN)).over
