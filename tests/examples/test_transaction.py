"""`examples/transaction` does what its README says."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import Client, RemoteError, SyncClient, TaskCancelled
from penstock.control.tasks import retry
from tests.examples.conftest import Program
from tests.helpers import eventually_sync

ORDER = Path(__file__).parents[2] / "examples" / "transaction" / "order.py"
LAMP = {"amount": 7, "article": "lamp"}

pytestmark = pytest.mark.blocks


class Shop:
    """The example at work in a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"sqlite:///{folder / 'shop.db'}"
        self.client = SyncClient(self.url)
        self.program = self._start()

    def _start(self) -> Program:
        program = Program(ORDER, (), self.folder, {**os.environ, "PENSTOCK_BROKER": self.url})
        program.until_logged("consuming ")
        return program

    def kill_and_start(self) -> None:
        self.program.process.send_signal(signal.SIGKILL)
        self.program.process.wait(10)
        self.program = self._start()

    def close(self) -> None:
        self.client.close()
        self.program.end()

    def books(self, id: str) -> list[str]:
        """What was done for an order."""
        path = self.folder / "books"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split()[0] for line in lines if line.split()[1] == id]

    def retry(self, id: str) -> None:
        async def work() -> None:
            async with Client(self.url) as client:
                await retry(await client._get_ledger(), await client._get_broker(), id)

        asyncio.run(work())


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    found = Shop(tmp_path)
    yield found
    found.close()


def test_an_order_is_paid_reserved_and_shipped_once(shop: Shop) -> None:
    handle = shop.client.send("order", LAMP)
    result: Any = handle.result(20)
    assert result == {"receipt": f"R-{handle[-4:]}", "parcel": f"P-{handle[-4:]}"}
    assert shop.books(handle) == ["charged", "reserved", "shipped"]


def test_what_is_out_of_stock_is_refunded(shop: Shop) -> None:
    handle = shop.client.send("order", {"amount": 7, "article": "anvil"})
    with pytest.raises(TaskCancelled):
        handle.result(20)
    assert shop.books(handle) == ["charged", "refunded"]


def test_a_stolen_card_is_not_refunded(shop: Shop) -> None:
    handle = shop.client.send("order", {**LAMP, "stolen": True})
    with pytest.raises(RemoteError, match="the card is stolen"):
        handle.result(20)
    assert shop.books(handle) == ["charged"]


def test_an_order_that_was_suspended_goes_on_where_it_was(shop: Shop) -> None:
    (shop.folder / "strike").touch()
    handle = shop.client.send("order", LAMP)
    with pytest.raises(RemoteError, match="nobody drives today"):
        handle.result(20)
    (shop.folder / "strike").unlink()
    shop.retry(handle)
    assert handle.result(20)
    assert shop.books(handle) == ["charged", "reserved", "shipped"]


def test_killed_in_the_midst_nothing_is_done_twice_but_what_was_under_way(shop: Shop) -> None:
    handles = [shop.client.send("order", LAMP) for _ in range(20)]
    eventually_sync(lambda: "charged" in shop.books(handles[3]), "some are under way")
    shop.kill_and_start()
    for handle in handles:
        assert handle.result(60)
    books = {handle: Counter(shop.books(handle)) for handle in handles}
    assert all(set(done) == {"charged", "reserved", "shipped"} for done in books.values())
    assert sum(done.total() - 3 for done in books.values()) <= 1
