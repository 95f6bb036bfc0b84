"""The NATS server is stopped, killed and frozen under load, and the line to it is cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest

from penstock import App, Client, Message
from penstock.errors import PublishError
from penstock.testing.faults import NatsNode, Proxy, seconds_until, wait_until
from tests.faults.scenes import LEASE, PREFETCH, NatsScene
from tests.faults.test_connections import BACK_WITHIN, works
from tests.faults.test_connections import seconds_until as seconds_until_soon
from tests.faults.test_server import Publisher
from tests.helpers import eventually

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(300)]

RESTARTS = int(os.environ.get("FAULTS_RESTARTS", "10"))
"""How often the server goes and comes back, in each way."""


def stop(node: NatsNode) -> None:
    node.stop()


def kill(node: NatsNode) -> None:
    node.kill()


@pytest.mark.parametrize("end", [stop, kill])
def test_a_restart_of_the_server_loses_nothing_and_needs_none_of_ours(
    mesh: NatsScene, nats_node: NatsNode, end: Callable[[NatsNode], None]
) -> None:
    backs: list[float] = []
    with mesh.consumers(2) as consumers:
        first = {process.pid for process in consumers.running}
        wait_until(mesh.declared, "the queues are declared", 20)
        with Publisher(mesh.client, 20_000) as publisher:
            for _ in range(RESTARTS):
                before = mesh.ledger.count("finished")
                wait_until(lambda: mesh.ledger.count("finished") >= before + 100, "it is at work", 30)  # noqa: B023
                end(nats_node)
                nats_node.start()
                before = mesh.ledger.count("finished")
                back = seconds_until(lambda: mesh.ledger.count("finished") > before, "it works again", 60)  # noqa: B023
                backs.append(back)
        mesh.wait_for_all(publisher.confirmed)
        assert {process.pid for process in consumers.running} == first
        assert all(process.poll() is None for process in consumers.running), consumers.log[-2000:]
    finished = mesh.ledger.times("finished")
    lost = set(publisher.confirmed) - set(finished)
    duplicates = sum(finished[id] - 1 for id in publisher.confirmed)
    print(
        f"{len(backs)} × {end.__name__}: lost {len(lost)} of {len(publisher.confirmed)}, duplicates {duplicates}, "
        f"consuming again after {', '.join(f'{back:.1f}' for back in backs)} s"
    )
    assert publisher.confirmed
    assert not lost
    assert max(backs) <= BACK_WITHIN
    assert mesh.dead() == []


def test_what_a_killed_consumer_held_is_taken_over_within_the_lease(mesh: NatsScene) -> None:
    longest = 0.0
    with mesh.consumers(2) as consumers:
        wait_until(mesh.declared, "the queues are declared", 20)
        for _ in range(5):
            ids = mesh.publish("slow", list(range(6)))
            wait_until(lambda: set(ids) & set(mesh.ledger.times("started")), "it is at work", 20)  # noqa: B023
            consumers.kill(consumers.running[0])
            began = time.monotonic()
            consumers.start()
            wait_until(lambda: set(ids) <= set(mesh.ledger.times("finished")), "all are finished", 30)  # noqa: B023
            longest = max(longest, time.monotonic() - began)
    print(f"all of six finished at most {longest:.1f} s after a kill, lease {LEASE} s, 0.3 s each")
    assert longest <= LEASE + 2 + 6 * 0.3


async def test_a_hundred_cut_connections_lose_nothing_and_leave_nothing_behind(
    mesh: NatsScene, nats_node: NatsNode
) -> None:
    cuts, rng = 100, random.Random(5)
    handled: Counter[str] = Counter()
    confirmed: list[str] = []
    async with Proxy(nats_node.port) as proxy:
        url = nats_node.url(mesh.space, proxy.port)
        app = App(url, prefetch=PREFETCH, lease=LEASE)

        @app.route("work", concurrency=4, backoff=(0.05, 0.2))
        async def work(message: Message) -> None:
            handled[message.id] += 1

        async with app, Client(url) as client:

            async def publish() -> None:
                while proxy.cuts < cuts:
                    with contextlib.suppress(PublishError):
                        confirmed.extend(await client.publish_many("work", ["x"] * 10, timeout=10))
                    await asyncio.sleep(0.05)

            await works(app, handled)
            await client.publish("work", "connected")
            for _ in range(3):
                proxy.cut()
                await asyncio.sleep(0.2)
            await works(app, handled)
            await client.publish("work", "connected")
            tasks, done = len(asyncio.all_tasks()), proxy.cuts
            cuts += done
            publisher = asyncio.create_task(publish())
            while proxy.cuts < cuts:
                await asyncio.sleep(rng.uniform(0.1, 0.3))
                proxy.cut()
            await publisher
            back = await seconds_until_soon(
                lambda: app.consuming and set(confirmed) <= set(handled), "all are handled, and it consumes", 60
            )
            await eventually(lambda: len(asyncio.all_tasks()) <= tasks, "tasks are back at the baseline", 30)
    lost = set(confirmed) - set(handled)
    duplicates = sum(handled[id] - 1 for id in confirmed)
    print(
        f"{proxy.cuts - done} cuts: lost {len(lost)} of {len(confirmed)}, duplicates {duplicates}, all handled "
        f"{back:.1f} s after the last, {tasks} tasks before and after"
    )
    assert confirmed
    assert not lost
    assert back <= BACK_WITHIN


@pytest.mark.parametrize("who", ["the line swallows everything", "the server is frozen"])
async def test_a_half_open_connection_is_noticed(mesh: NatsScene, nats_node: NatsNode, who: str) -> None:
    handled: Counter[str] = Counter()
    async with Proxy(nats_node.port) as proxy:
        app = App(nats_node.url(mesh.space, proxy.port, ping_interval=1, timeout=2), prefetch=PREFETCH, lease=LEASE)

        @app.route("work")
        async def work(message: Message) -> None:
            handled[message.id] += 1

        async with app:
            await works(app, handled)
            (proxy.swallow if "line" in who else nats_node.pause)()
            noticed = await seconds_until_soon(lambda: not app.consuming, "it is noticed")
            (proxy.restore if "line" in who else nats_node.resume)()
            began = time.monotonic()
            await works(app, handled)
            back = time.monotonic() - began
            assert app.consuming
    print(f"{who}: noticed after {noticed:.1f} s, back {back:.1f} s after its end")
    assert noticed <= 5
    assert back <= BACK_WITHIN
