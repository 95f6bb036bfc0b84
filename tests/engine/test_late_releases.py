"""A system on which what was given back is there again only after a while: suspects are run all the same."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence

import pytest

from penstock import App, Message
from penstock.brokers.base import Release, Settlement
from penstock.brokers.memory.broker import MemorySubscription
from penstock.message import Delivery, Outgoing
from tests.helpers import eventually


@pytest.mark.parametrize("apps", [1, 3])
@pytest.mark.parametrize("late", [0.05, 0.3, 0.8])
async def test_a_suspect_is_run_though_it_comes_back_late(
    late: float, apps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = MemorySubscription.settle

    async def settle_late(subscription: MemorySubscription, items: Sequence[Settlement]) -> Sequence[Delivery]:
        later = [Release(item.delivery, max(item.delay, late)) if isinstance(item, Release) else item for item in items]
        return await settle(subscription, later)

    monkeypatch.setattr(MemorySubscription, "settle", settle_late)
    ran: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as running:
        for _ in range(apps):
            app = App("memory://late-releases", lease=1, grace=1)

            @app.route("work")
            async def work(message: Message) -> None:
                ran[message.id] += 1

            await running.enter_async_context(app)
        broker = await app.client._pool.get()
        suspects = [Outgoing(id=id, topic="work.suspects", body=b"1") for id in "abc"]
        assert await broker.publish(suspects) == [None] * 3
        await eventually(lambda: ran.keys() == {"a", "b", "c"})
    assert set(ran.values()) == {1}
