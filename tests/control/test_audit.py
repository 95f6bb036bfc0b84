"""The audit: nothing is forgotten before its time, nothing secret is kept, nothing grows without bound."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.control.audit import LONG, MOST, PREFIX, SHORT, TTL, Audit
from penstock.control.masking import LOOKED_AT, line, masked
from penstock.stores import registry
from penstock.stores.base import Put, Store


class SetClock:
    """A clock that stands where it is put."""

    now = 1_790_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = registry.connect(f"sqlite:///{tmp_path / 'audit.db'}")
    await store.open()
    yield store
    await store.close()


async def test_the_latest_come_first_and_page_by_page(store: Store) -> None:
    audit = Audit(store)
    for number in range(7):
        await audit.write("edit", "task.cancel", str(number))
    first = await audit.latest(3)
    assert [one.target for one in first] == ["6", "5", "4"]
    assert [one.target for one in await audit.latest(10, after=first[-1].id)] == ["3", "2", "1", "0"]
    assert (first[0].who, first[0].what, first[0].detail, first[0].outcome) == ("edit", "task.cancel", "", "ok")


async def test_entries_stay_in_order_when_the_clock_stands_or_goes_back(store: Store) -> None:
    clock = SetClock()
    audit = Audit(store, clock)
    for number, step in enumerate((0, 0, -3600, 1, 0)):
        clock.now += step
        await audit.write("edit", "x", str(number))
    assert [one.target for one in await audit.latest()] == ["4", "3", "2", "1", "0"]
    assert (await audit.latest(1))[0].at == clock.now


async def test_an_entry_lives_ninety_days_and_its_texts_are_bounded(store: Store) -> None:
    audit = Audit(store)
    await audit.write("w" * 5000, "a\nb", "t" * 5000, "d " * 50_000, "o" * 5000)
    (entry,) = await store.scan(PREFIX)
    (told,) = await audit.latest()
    assert entry.expires_at == pytest.approx(told.at + TTL, abs=60)
    assert [len(text) for text in (told.who, told.target, told.outcome)] == [SHORT, SHORT, LONG]
    assert len(told.detail) <= LONG
    assert told.what == "a b"
    assert len(entry.value) < 5000


async def test_no_secret_reaches_the_store_not_even_where_the_text_is_cut(store: Store) -> None:
    audit = Audit(store)
    await audit.write("edit", "definition.put", "configs/db", 'x password: "hunterhunter\nhunter"')
    for fill in range(LONG - 40, LONG + 3):
        await audit.write("edit", "x", "t", "x" * fill + " amqp://neo:hunterhunter@host/ password=hunterhunter")
    for fill in range(LOOKED_AT - 40, LOOKED_AT + 3):
        await audit.write("edit", "x", "t", " " * fill + "amqp://neo:hunterhunter@host/")
    for entry in await store.scan(PREFIX, limit=1000):
        assert b"hun" not in entry.value


async def test_text_that_nobody_could_store_is_written_all_the_same(store: Store) -> None:
    audit = Audit(store)
    await audit.write("edit", "x", "caf\udce9\0", "\x1b[31m")
    assert (await audit.latest())[0].target == "caf\\udce9\0"


async def test_what_cannot_be_read_hides_nothing_else(store: Store) -> None:
    audit = Audit(store)
    await audit.write("edit", "x", "before")
    await store.apply([Put(PREFIX + "8", b"{nonsense")])
    told = await audit.latest()
    assert told[0].outcome.startswith("unreadable: ")
    assert told[1].target == "before"


async def test_one_look_has_its_bound_and_a_foreign_id_is_no_page(store: Store) -> None:
    audit = Audit(store)
    await store.apply([Put(f"{PREFIX}{number:016x}", b"{}") for number in range(MOST + 5)])
    assert len(await audit.latest(10**9)) == MOST
    assert len(await audit.latest(0)) == 1
    with pytest.raises(ValueError, match="null character"):
        await audit.latest(after="a\0b")


@pytest.mark.parametrize(
    "text",
    [
        "amqp://neo:{}@host/vhost",
        "redis://:{}@host:6379",
        "two amqp://a:{}@b,amqp://c:{}@d",
        "Authorization: Bearer {}",
        "authorization=Basic {}",
        "password={}&x=1",
        '{{"password": "{}", "x": 1}}',
        '{{"api_key":"{}"}}',
        "password: {} and more of it",
        "password: |\n  {}\n  {}\nname: x",
        "db_passwd: '{} {}'",
        "PENSTOCK_TOKEN={}",
        "client-secret = {}",
        "secret_key: {}",
        "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----\n{}",
    ],
)
def test_what_is_secret_is_masked(text: str) -> None:
    secret = "sw0rd-f1sh/+x"
    assert secret in text.format(secret, secret)
    assert "sw0rd" not in masked(text.format(secret, secret))
    assert "***" in masked(text.format(secret, secret))


@pytest.mark.parametrize("text", ["token:edit", "http://host:8470/tasks", "orders", "mode: single, watch_interval: 5"])
def test_what_is_not_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_a_line_is_one_line() -> None:
    assert line("a\n\tb  c\u2028d", 100) == "a b c d"
    assert line("abcdef", 4) == "abc…"
