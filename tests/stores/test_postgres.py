"""PostgreSQL as a store: the whole suite on the real server."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from penstock.errors import BrokerError
from penstock.stores.base import ABSENT, Delete, Put
from penstock.stores.postgres import PostgresStore
from penstock.testing.stores import StoreConformance, StoreHarness


class TestPostgresStore(StoreConformance):
    @pytest.fixture
    def harness(self, postgres_url: str) -> StoreHarness:
        return StoreHarness(connect=lambda: PostgresStore(postgres_url))


async def test_what_was_deleted_or_has_expired_is_removed_a_while_later(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.stores.postgres.store.SWEEP_EVERY", 0.0)
    dsn, _, schema = postgres_url.partition("?schema=")
    store, operator = PostgresStore(postgres_url), await asyncpg.connect(dsn)
    first = await store.apply(
        [Put("deleted", b"x"), Put("expired", b"x", ttl=0.0), Put("kept", b"x"), Delete("deleted")]
    )
    again = await store.apply([Put("deleted", b"y", expect=ABSENT)])
    assert (again[0] or 0) > (first[0] or 0), "a version is never given twice"
    await store.apply([Delete("deleted")])
    await operator.execute(f"UPDATE {schema}.entries SET expires = expires - 100 WHERE expires < 'Infinity'")
    async with asyncio.timeout(10):
        while await operator.fetchval(f"SELECT count(*) FROM {schema}.entries") > 2:
            await store.apply([Put("another", b"z")])
            await asyncio.sleep(0.01)
    assert [entry.key for entry in await store.scan("")] == ["another", "kept"]
    await asyncio.gather(store.close(), operator.close())


async def test_a_key_that_is_too_long_disturbs_nobody(postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    too_long = store.apply([Put("".join(chr(0x4E00 + number) for number in range(1500)), b"")])
    outcomes = await asyncio.gather(too_long, store.apply([Put("k", b"v")]), return_exceptions=True)
    assert isinstance(outcomes[0], BrokerError)
    assert await store.get(["k"]) != [None]
    await store.close()


async def test_those_who_change_the_same_keys_in_another_order_do_not_wait_in_a_circle(postgres_url: str) -> None:
    stores = [PostgresStore(postgres_url) for _ in range(4)]
    keys = [f"k{number}" for number in range(50)]

    async def change(nth: int) -> None:
        for _ in range(10):
            order = keys if nth % 2 else keys[::-1]
            assert None not in await stores[nth].apply([Put(key, b"x") for key in order])

    async with asyncio.timeout(20):
        await asyncio.gather(*(change(nth) for nth in range(4)))
    await asyncio.gather(*(store.close() for store in stores))
