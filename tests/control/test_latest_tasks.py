"""The list of the latest tasks: bounded in what it carries, and filtered without reading it."""

from __future__ import annotations

import time

import pytest

from penstock import codec, terms
from penstock.control import tasks
from penstock.stores.ledger import Ledger
from penstock.stores.memory import MemoryStore, MemoryStoreServer
from penstock.stores.records import Body, Sent, Standing
from penstock.terms import Terms

ASKED = {terms.HEADER: terms.write(Terms(recorded=True))}


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(MemoryStore(server=MemoryStoreServer()))


async def send(ledger: Ledger, number: int, body: bytes, topic: str = "work", packed: bool = False) -> None:
    headers = {**ASKED, codec.CONTENT_TYPE: codec.TEXT}
    if packed:
        body, headers = codec.compress(body, headers)  # type: ignore[assignment]
        assert codec.CONTENT_ENCODING in headers
    await ledger.send(f"{number:04}", Sent(topic, Body(body, headers), time.time(), None, [topic]))


@pytest.mark.parametrize("packed", [False, True])
async def test_a_list_carries_so_many_bytes(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    monkeypatch.setattr(tasks, "MOST_SHOWN", 250_000)
    for number in range(6):
        await send(ledger, number, b"x" * 100_000, packed=packed)
    found = await tasks.latest(ledger, 100)
    assert [one.taskid for one in found] == ["0005", "0004"]
    assert found[0].content == "x" * 100_000


async def test_the_older_ones_can_be_asked_for(ledger: Ledger) -> None:
    for number in range(6):
        await send(ledger, number, b"1")
    first = await tasks.latest(ledger, 4)
    assert [one.taskid for one in await tasks.latest(ledger, 4, after=first[-1].taskid)] == ["0001", "0000"]


async def test_what_only_says_that_it_is_huge_hides_no_other(ledger: Ledger) -> None:
    await send(ledger, 1, b"1")
    headers = {**ASKED, codec.CONTENT_TYPE: codec.TEXT, codec.CONTENT_ENCODING: "gzip"}
    boast = Body(b"\x1f\x8b" + bytes(18) + b"\xff\xff\xff\xff", headers)
    await ledger.send("0002", Sent("work", boast, time.time(), None, ["work"]))
    await send(ledger, 3, b"1")
    assert [one.taskid for one in await tasks.latest(ledger, 10)] == ["0003", "0002", "0001"]


async def test_one_task_is_always_shown(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "MOST_SHOWN", 10)
    await send(ledger, 1, b"x" * 100)
    await send(ledger, 2, b"x" * 100)
    assert [one.taskid for one in await tasks.latest(ledger, 100)] == ["0002"]


async def test_large_ones_are_looked_at_few_at_a_time(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "LARGE", 1000)
    for number in range(60):
        await send(ledger, number, b"x" * 500)
    asked: list[int] = []
    real = ledger.page

    async def page(limit: int, after: str | None = None) -> list[Standing]:
        asked.append(limit)
        return await real(limit, after)

    monkeypatch.setattr(ledger, "page", page)
    assert len(await tasks.latest(ledger, 100)) == 60
    assert asked[:3] == [20, 5, 1]


async def test_of_a_topic_only_what_was_sent_to_it_is_read(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(300):
        await send(ledger, number, b"1", "wanted" if number % 100 == 0 else "other")
    read: list[str] = []
    real = Standing.as_record

    def as_record(self: Standing, limit: int) -> object:
        read.append(self.taskid)
        return real(self, limit)

    monkeypatch.setattr(Standing, "as_record", as_record)
    found = await tasks.latest(ledger, 100, topic="wanted")
    assert [one.taskid for one in found] == read == ["0200", "0100", "0000"]
