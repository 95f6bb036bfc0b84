"""Three NATS servers, of which some are killed under load: nothing is lost, and all goes on by itself."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import App, Client, Message
from penstock.brokers import registry
from penstock.brokers.base import Broker, Queue
from penstock.errors import BrokerError, BrokerUnavailable, PublishError, TimeoutError
from penstock.testing.faults import ClusterNode, NatsCluster, wait_until
from tests.faults.scenes import LEASE, PREFETCH, NatsScene, Scene
from tests.faults.test_server import Publisher
from tests.helpers import eventually
from tests.servers import require

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(180)]

BACK_WITHIN = 30.0
"""Seconds from the loss of a node until all goes on: an election takes 4 to 9, and a second one may be needed."""
TOGETHER = 20
"""Messages that the publisher has on their way."""

_spaces = itertools.count(1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    require("nats")
    with NatsCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: NatsCluster) -> NatsCluster:
    """All three running, whatever the test before did to them."""
    for node in shared.nodes:
        node.resume()
    shared.start()
    return shared


class ClusterScene(NatsScene):
    """A space on the cluster."""

    def __init__(self, folder: Path, cluster: NatsCluster, space: str) -> None:
        self.cluster = cluster
        self.space = space
        Scene.__init__(self, folder, cluster.url(space))

    def at_work(self) -> set[int]:
        """Processes that have finished something."""
        return {entry.pid for entry in self.ledger.entries() if entry.event == "finished"}

    def _look(self) -> dict[str, tuple[int, int]]:
        prefix = f"{self.space}-q-"
        streams = self.cluster.streams().items()
        return {name.removeprefix(prefix): (count, 0) for name, count in streams if name.startswith(prefix)}


@pytest.fixture
def scene(cluster: NatsCluster, tmp_path: Path) -> Iterator[ClusterScene]:
    made = ClusterScene(tmp_path, cluster, f"test-{next(_spaces)}")
    yield made
    made.close()


async def test_killed_leaders_lose_nothing_and_all_goes_on_by_itself(scene: ClusterScene, cluster: NatsCluster) -> None:
    stream, rng = f"{scene.space}-q-work", random.Random(3)
    victims: list[tuple[str, Callable[[], ClusterNode | None]]] = [
        ("leader of all", lambda: cluster.leader),
        ("leader of the stream", lambda: cluster.leader_of(stream)),
        ("leader of the consumer", lambda: cluster.consumer_leader_of(stream)),
        ("any", lambda: rng.choice(cluster.nodes)),
    ]
    heard: Counter[str] = Counter()
    app = App(cluster.url(scene.space, cluster.nodes[1]), prefetch=PREFETCH, lease=LEASE)

    @app.task
    async def echo(number: int) -> int:
        return number

    @app.subscribe("news")
    async def on_news(item: Any) -> None:
        heard[item] += 1

    async def answered(client: Client, number: int) -> bool:
        with contextlib.suppress(BrokerError, TimeoutError):
            return bool(await client.call("echo", number, timeout=5) == number)
        return False

    async def told(client: Client, item: str) -> bool:
        with contextlib.suppress(BrokerError, TimeoutError):
            await client.broadcast("news", item)
        return heard[item] > 0

    backs: list[str] = []
    client = Client(cluster.url(scene.space, cluster.nodes[2]))
    with scene.consumers(2) as consumers:
        first = {process.pid for process in consumers.running}
        await asyncio.to_thread(wait_until, scene.declared, "the queues are declared", 30)
        async with app, client:
            await eventually(lambda: answered(client, 0), "calls are answered")
            with Publisher(scene.client, 20_000) as publisher:
                await eventually(lambda: scene.at_work() >= first, "all are at work", BACK_WITHIN)
                for number, (what, find) in enumerate(victims, 1):
                    victim = await eventually(find, f"there is a {what}")
                    began = time.monotonic()
                    await asyncio.to_thread(victim.kill)
                    probe = await client.publish("work", "probe", timeout=BACK_WITHIN)
                    await eventually(lambda: scene.ledger.times("finished")[probe], "it is handled", BACK_WITHIN)  # noqa: B023
                    backs.append(f"{what} {time.monotonic() - began:.1f}")
                    await eventually(lambda: answered(client, number), "calls are answered", BACK_WITHIN)  # noqa: B023
                    await eventually(lambda: told(client, f"item {number}"), "broadcasts are heard", BACK_WITHIN)  # noqa: B023
                    await asyncio.to_thread(cluster.start)
            await asyncio.to_thread(scene.wait_for_all, publisher.confirmed)
        assert {process.pid for process in consumers.running} == first
        assert all(process.poll() is None for process in consumers.running), consumers.log[-2000:]
    finished = scene.ledger.times("finished")
    lost = set(publisher.confirmed) - set(finished)
    duplicates = sum(finished[id] - 1 for id in publisher.confirmed)
    print(
        f"{len(backs)} nodes killed: lost {len(lost)} of {len(publisher.confirmed)}, duplicates {duplicates}, "
        f"publishing and consuming again after {', '.join(backs)} s"
    )
    assert publisher.confirmed
    assert not lost
    assert duplicates <= len(victims) * (2 * PREFETCH + TOGETHER)
    assert await asyncio.to_thread(scene.dead) == []


async def test_without_a_majority_publishing_is_an_error_and_all_heals_when_it_is_back(
    cluster: NatsCluster, caplog: pytest.LogCaptureFixture
) -> None:
    space = f"test-{next(_spaces)}"
    handled: Counter[str] = Counter()
    three = registry.connect(cluster.url(space))
    await three.open()
    await three.close()
    alone = registry.connect(cluster.url(space, replicas=1))
    await alone.open()
    await alone.declare(Queue("alone"))
    where = await eventually(lambda: cluster.leader_of(f"{space}-q-alone"), "it is somewhere")
    second = next(node for node in cluster.nodes if node is not where)
    await alone.close()

    app = App(where.url(space, timeout=2, replicas=3), prefetch=PREFETCH, lease=LEASE)  # which tells of the others

    @app.route("work")
    async def work(message: Message) -> None:
        handled[message.id] += 1

    async with app:
        confirmed = await app.publish_many("work", ["before"] * 20)
        await eventually(lambda: set(confirmed) <= set(handled), "it is at work")
        for node in (where, second):
            await asyncio.to_thread(node.kill)
        for _ in range(3):
            with pytest.raises(PublishError):
                await app.publish("work", "without", timeout=2)
        with pytest.raises(PublishError) as caught:
            await app.publish_many("work", ["without"] * 20, timeout=2)
        await eventually(lambda: not app.consuming, "it does not consume, and says so")

        await asyncio.to_thread(second.start)
        began = time.monotonic()
        confirmed.append(await app.publish("work", "after", timeout=BACK_WITHIN))
        await eventually(lambda: app.consuming and set(confirmed) <= set(handled), "all is handled", BACK_WITHIN)
        back = time.monotonic() - began

        await eventually(lambda: cluster.leader, "they have a leader")
        alone = registry.connect(cluster.url(space, second, timeout=2))
        assert not await declared(alone, Queue("alone"))
        await asyncio.to_thread(where.start)
        await eventually(lambda: declared(alone, Queue("alone")), "its node is back", BACK_WITHIN)
        await alone.close()
    print(f"{caught.value!r}; all handled {back:.1f} s after there was a majority again")
    assert max(handled[id] for id in confirmed) == 1
    assert "queue 'alone' exists with 1 replicas" in caplog.text


async def declared(broker: Broker, queue: Queue) -> bool:
    """False: it cannot be now, which is not that it never will be."""
    with contextlib.suppress(BrokerUnavailable):
        await broker.declare(queue)
        return True
    return False
