"""Redis keeps the contract: the whole suite on the real server, and what is durable on one that syncs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.brokers.redis import RedisBroker
from penstock.testing import victim
from penstock.testing.conformance import Conformance, Harness
from penstock.testing.conformance.delay import DelayPromises
from penstock.testing.conformance.harness import System
from penstock.testing.conformance.lifecycle import LifecyclePromises
from penstock.testing.conformance.move import MovePromises
from penstock.testing.conformance.publish import PublishPromises
from penstock.testing.conformance.settle import SettlePromises
from penstock.testing.faults import RedisNode
from tests.servers import require


class TestRedis(Conformance):
    @pytest.fixture
    def harness(self, redis_url: str) -> Harness:
        return Harness(connect=lambda: RedisBroker(redis_url), crash_consumer=victim.killed(redis_url))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisNode]:
    """A server of our own that syncs each write."""
    require("redis")
    with RedisNode(tmp_path_factory.mktemp("redis")) as node:
        yield node


class TestDurableRedis(LifecyclePromises, PublishPromises, SettlePromises, MovePromises, DelayPromises):
    @pytest.fixture
    def harness(self, node: RedisNode, request: pytest.FixtureRequest) -> Harness:
        url = node.url(request.node.name)
        return Harness(connect=lambda: RedisBroker(url), crash_consumer=victim.killed(url))

    async def test_it_says_that_it_is_durable(self, system: System) -> None:
        assert (await system.connect()).capabilities.durable
