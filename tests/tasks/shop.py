"""A shop whose orders are transactions."""

from __future__ import annotations

import asyncio
from typing import Any

from penstock import App, UnknownTransaction, transaction
from tests.helpers import eventually

SOON = (0.01, 0.02)  # seconds of backoff


class Shop:
    """What the steps do, and how often."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.failing: set[str] = set()
        self.waiting: dict[str, asyncio.Event] = {}
        self.reached = asyncio.Event()

    async def do(self, what: str) -> dict[str, str]:
        self.did.append(what)
        self._fail(what)
        if what in self.waiting:
            self.reached.set()
            await self.waiting[what].wait()
        return {"of": what}

    def undo(self, result: dict[str, str]) -> None:
        what = f"un{result['of']}"
        self.did.append(what)
        self._fail(what)

    def hold(self, what: str) -> None:
        """Have a step wait until it is let go."""
        self.waiting[what] = asyncio.Event()

    def let_go(self) -> None:
        for event in self.waiting.values():
            event.set()

    def _fail(self, what: str) -> None:
        if what in self.failing:
            raise ConnectionError(f"no {what}")


def order(app: App, shop: Shop, **options: Any) -> Any:
    """A task of three steps."""

    @app.task("order", **options)
    async def order(request: Any) -> list[Any]:
        async with transaction("order") as t:
            return [await t.step(what, shop.do, what, undo=shop.undo) for what in ("pay", "pack", "ship")]

    return order


async def ended(app: App, taskid: str) -> Any:
    return await app.waitfor(taskid, 20)


async def stands(app: App, id: str, status: str) -> Any:
    """The transaction, once it has a status."""

    async def look() -> Any:
        try:
            found = await app.transactions.get(id)
        except UnknownTransaction:
            return None
        return found if found.status == status else None

    return await eventually(look, f"{id} is {status}")
