"""The line to the server is cut, goes silent, or is closed by the server: consuming goes on by itself.

The app runs in this process, its connections through a proxy to a server of our own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiormq
import pytest

from penstock import App, Client, Message
from penstock.errors import PublishError
from penstock.testing.faults import Proxy, RabbitNode
from tests.faults.scenes import PREFETCH, RabbitScene, Served, read_dead
from tests.helpers import eventually

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(180)]

HEARTBEAT = 1
"""Seconds. A dead line is to be noticed within 3 × (heartbeat + 1)."""
BACK_WITHIN = 10.0
"""Seconds until messages flow again after a fault is over."""


async def seconds_until(condition: Callable[[], Any], what: str, within: float = 30.0) -> float:
    began = time.monotonic()
    await eventually(condition, what, within)
    return time.monotonic() - began


async def works(app: App, handled: Counter[str]) -> None:
    """Publish until one message has come through: the queue may not be there yet, or not take it yet."""
    until = time.monotonic() + 2 * BACK_WITHIN
    while True:
        try:
            probe = await app.publish("work", "probe", timeout=2)
            break
        except PublishError:
            assert time.monotonic() < until, "publishing works again"
            await asyncio.sleep(0.05)
    await eventually(lambda: handled[probe], "the probe is handled", within=2 * BACK_WITHIN)


def resident() -> int:
    """Bytes of memory that this process has in use."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("who", ["the line swallows everything", "the server is frozen"])
async def test_a_half_open_connection_is_noticed_within_three_heartbeats(served: Served, who: str) -> None:
    handled: Counter[str] = Counter()
    async with Proxy(served.node.port) as proxy:
        app = App(served.by(proxy.port, quick=True), prefetch=PREFETCH)

        @app.route("work")
        async def work(message: Message) -> None:
            handled[message.id] += 1

        async with app:
            await works(app, handled)
            (proxy.swallow if "line" in who else served.node.pause)()
            noticed = await seconds_until(lambda: not app.consuming, "it is noticed")
            (proxy.restore if "line" in who else served.node.resume)()
            began = time.monotonic()
            await works(app, handled)
            back = time.monotonic() - began
            assert app.consuming
    print(f"{who}: noticed after {noticed:.1f} s, back {back:.1f} s after its end")
    assert noticed <= 3 * (HEARTBEAT + 1) + 0.5, "half a second for a busy machine"
    assert back <= BACK_WITHIN


async def test_two_hundred_cut_connections_lose_nothing_and_leave_nothing_behind(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    cuts, rng = 200, random.Random(5)
    caplog.set_level(logging.CRITICAL)  # records that a test keeps would count as growth
    handled: Counter[str] = Counter()
    confirmed: list[str] = []
    async with Proxy(served.node.port) as proxy:
        url = served.by(proxy.port)
        app = App(url, prefetch=PREFETCH)

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
            for _ in range(10):  # what the first reconnects allocate once and for all
                proxy.cut()
                await asyncio.sleep(0.2)
            await works(app, handled)
            await client.publish("work", "connected")
            tasks, memory, done = len(asyncio.all_tasks()), resident(), proxy.cuts
            cuts += done
            publisher = asyncio.create_task(publish())
            while proxy.cuts < cuts:
                await asyncio.sleep(rng.uniform(0.1, 0.3))
                proxy.cut()
            await publisher
            back = await seconds_until(
                lambda: app.consuming and set(confirmed) <= set(handled), "all are handled, and it consumes", 60
            )
            await eventually(lambda: len(asyncio.all_tasks()) <= tasks, "tasks are back at the baseline", 30)
            grown = resident() / memory - 1
    lost = set(confirmed) - set(handled)
    duplicates = sum(handled[id] - 1 for id in confirmed)
    print(
        f"{proxy.cuts - done} cuts: lost {len(lost)} of {len(confirmed)}, duplicates {duplicates}, all handled "
        f"{back:.1f} s after the last, {tasks} tasks before and after, memory {grown:+.1%} of {memory >> 20} MiB"
    )
    assert confirmed
    assert not lost
    assert back <= BACK_WITHIN
    assert grown < 0.10


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "deleted and made again"])
async def test_consuming_survives_the_deletion_of_its_queue(
    rabbit: RabbitScene, caplog: pytest.LogCaptureFixture, again: bool
) -> None:
    handled: Counter[str] = Counter()
    app = App(rabbit.url, prefetch=PREFETCH)

    @app.route("work")
    async def work(message: Message) -> None:
        handled[message.id] += 1

    async with app:
        await works(app, handled)
        connection = await aiormq.connect(rabbit.url)
        channel = await connection.channel()
        await channel.queue_delete("work")
        if again:
            # Not sooner: of a quorum queue that is made again within milliseconds the server (3.10) forgets
            # to tell consumers that the old one has gone, and drops what it delivers to them.
            await eventually(lambda: "cancelled the consumer" in caplog.text)
            await channel.queue_declare("work", durable=True, arguments={"x-queue-type": "quorum"})
        await connection.close()
        began = time.monotonic()
        await works(app, handled)
        back = time.monotonic() - began
        assert app.consuming
    print(f"consuming {back:.1f} s after the queue was deleted")
    assert back <= BACK_WITHIN


async def test_a_handler_slower_than_consumer_timeout_ends_in_the_dead_letters_and_the_log_says_why(
    rabbit: RabbitScene, node: RabbitNode, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[int] = []
    handled: Counter[str] = Counter()
    app = App(rabbit.url, prefetch=PREFETCH)

    @app.route("work", max_attempts=3, backoff=(0.05, 0.1))
    async def work(message: Message) -> None:
        if message.body == "slow":
            runs.append(message.attempt)
            await asyncio.sleep(3)
        handled[message.id] += 1

    await asyncio.to_thread(node.set_consumer_timeout, 1.0)
    try:
        with caplog.at_level(logging.WARNING):
            async with app:
                slow = await app.publish("work", "slow")
                others = await app.publish_many("work", ["quick"] * 10)

                async def buried() -> bool:
                    return bool(await read_dead(rabbit.url, ["work.dead"]))

                took = await seconds_until(buried, "it is in the dead letters", 90)
                (letter,) = await read_dead(rabbit.url, ["work.dead"])
                await eventually(lambda: set(others) <= set(handled), "the others are handled")
                await works(app, handled)
                assert app.consuming
    finally:
        await asyncio.to_thread(node.set_consumer_timeout, None)
    print(f"in the dead letters ({letter.reason}) after {len(runs)} runs and {took:.1f} s")
    assert letter.id == slow
    assert len(runs) <= 4, "once with others, three times alone"
    assert runs == sorted(set(runs)), "each run is counted"
    warnings = [record.getMessage() for record in caplog.records if "consumer_timeout" in record.getMessage()]
    assert warnings, caplog.text[-2000:]


async def test_a_cut_between_effect_and_acknowledgement_repeats_at_most_that_one(served: Served) -> None:
    total, cuts, pause = 3_500, 100, 0.15
    effects: Counter[str] = Counter()
    by_key: dict[str, int] = {}
    async with Proxy(served.node.port) as proxy:
        app = App(served.by(proxy.port), prefetch=4)
        left, last = cuts, 0.0

        @app.route("work", backoff=(0.05, 0.2))
        async def work(message: Message) -> None:
            nonlocal left, last
            # One fault at a time: what the last cut sent back has been sorted by then.
            cutting = left and message.attempt == 1 and time.monotonic() > last + pause
            await asyncio.sleep(0.05 if cutting else 0.005)  # the acknowledgement of the one before arrives meanwhile
            effects[message.id] += 1
            by_key.setdefault(message.id, message.body)  # an effect that knows its key is had once
            if cutting:
                left, last = left - 1, time.monotonic()
                proxy.cut()
                await asyncio.sleep(0.01)  # as long as it takes to be known here: nothing else is begun

        publish = served.client.publish_many  # not through the proxy, which is cut all the time
        async with app:
            confirmed = await asyncio.to_thread(publish, "work", list(range(total)))
            took = await seconds_until(lambda: set(confirmed) <= set(effects), "all are handled", 120)

            async def settled() -> bool:
                return not await asyncio.to_thread(served.left)

            await eventually(settled, "all are settled", 30)
    duplicates = sum(effects.values()) - len(effects)
    print(f"{cuts - left} cuts: duplicates {duplicates}, effects by key {len(by_key)} of {total}, in {took:.1f} s")
    assert left == 0
    assert duplicates <= cuts
    assert sorted(by_key.values()) == list(range(total))
