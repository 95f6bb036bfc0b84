"""The server itself is stopped, killed and starved, under load."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from penstock import App, Message, PublishTimeout, SyncClient
from penstock.errors import BrokerError
from penstock.testing.faults import RabbitNode, RedisNode, seconds_until, wait_until
from tests.faults.scenes import PREFETCH, RabbitScene, Served
from tests.helpers import eventually

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(300)]

RESTARTS = int(os.environ.get("FAULTS_RESTARTS", "10"))
"""How often the server goes and comes back, in each way."""
BACK_WITHIN = 10.0
"""Seconds from the moment it serves again until messages are handled."""


class Publisher:
    """Publishes to `work` in a thread of its own until told to stop, over all outages."""

    def __init__(self, client: SyncClient, most: int) -> None:
        self.confirmed: list[str] = []
        self._client = client
        self._most = most
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="publisher")

    def __enter__(self) -> Publisher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _publish(self) -> None:
        while not self._stop.is_set() and len(self.confirmed) < self._most:
            try:
                self.confirmed += self._client.publish_many("work", ["x"] * 20, timeout=10)
            except BrokerError:
                continue  # not confirmed, so nothing is promised of them
            self._stop.wait(0.05)


def stop(node: RabbitNode | RedisNode) -> None:
    node.stop()


def kill(node: RabbitNode | RedisNode) -> None:
    node.kill()


@pytest.mark.parametrize("end", [stop, kill])
def test_a_restart_of_the_server_loses_nothing_and_needs_none_of_ours(
    served: Served, end: Callable[[RabbitNode | RedisNode], None]
) -> None:
    node = served.node
    backs: list[float] = []
    with served.consumers(2) as consumers:
        first = {process.pid for process in consumers.running}
        wait_until(served.declared, "the queues are declared", 20)
        with Publisher(served.client, 20_000) as publisher:
            for _ in range(RESTARTS):
                before = served.ledger.count("finished")
                wait_until(lambda: served.ledger.count("finished") >= before + 100, "it is at work", 30)  # noqa: B023
                end(node)
                node.start()
                before = served.ledger.count("finished")
                back = seconds_until(lambda: served.ledger.count("finished") > before, "it works again", 60)  # noqa: B023
                backs.append(back)
        served.wait_for_all(publisher.confirmed)
        assert {process.pid for process in consumers.running} == first
        assert all(process.poll() is None for process in consumers.running), consumers.log[-2000:]
    finished = served.ledger.times("finished")
    lost = set(publisher.confirmed) - set(finished)
    duplicates = sum(finished[id] - 1 for id in publisher.confirmed)
    times = ", ".join(f"{back:.1f}" for back in backs)
    print(
        f"{len(backs)} × {end.__name__}: lost {len(lost)} of {len(publisher.confirmed)}, duplicates {duplicates}, "
        f"consuming again after {times} s"
    )
    assert publisher.confirmed
    assert not lost
    assert max(backs) <= BACK_WITHIN
    assert served.dead() == []


async def test_under_a_memory_alarm_publishing_times_out_and_consuming_goes_on(
    rabbit: RabbitScene, node: RabbitNode
) -> None:
    handled: Counter[str] = Counter()
    short_of_memory = threading.Event()
    short_of_memory.set()
    app = App(rabbit.url, prefetch=PREFETCH)

    @app.route("work")
    async def work(message: Message) -> None:
        await asyncio.sleep(0.01)
        if message.body == "fails" and short_of_memory.is_set():
            raise ValueError("its retry has to be published, which is not possible now")
        handled[message.id] += 1

    async with app:
        failing = await app.publish_many("work", ["fails"] * 2)
        backlog = await app.publish_many("work", ["x"] * 400)
        await asyncio.to_thread(node.alarm, True)
        try:
            late = len(handled)
            began = time.monotonic()
            with pytest.raises(PublishTimeout):
                await app.publish("work", "refused", timeout=2)
            waited = time.monotonic() - began
            await eventually(lambda: set(backlog) <= set(handled), "the backlog is handled")

            async def settled() -> bool:
                return await asyncio.to_thread(rabbit.left) <= len(failing)

            await eventually(settled, "acknowledgements are taken")
            assert late < len(backlog), "there was something left to do under the alarm"
            assert app.consuming
        finally:
            short_of_memory.clear()
            await asyncio.to_thread(node.alarm, False)
        began = time.monotonic()
        id = await app.publish("work", "resumed", timeout=20)
        await eventually(lambda: handled[id])
        resumed = time.monotonic() - began
        await eventually(lambda: set(failing) <= set(handled), "what had failed is tried again")
    print(f"refused after {waited:.1f} s, {len(backlog) - late} handled meanwhile, resumed after {resumed:.1f} s")
    assert 1.9 <= waited <= 3
    assert resumed <= 5
    assert not [id for id in backlog if handled[id] > 1]
