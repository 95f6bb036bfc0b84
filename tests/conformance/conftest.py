"""For the tests of what is RabbitMQ's own; those of the suite have fixtures of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from penstock.brokers.amqp import AmqpBroker
from penstock.brokers.base import Broker
from penstock.testing.conformance.harness import Harness, System


@pytest_asyncio.fixture
async def system(amqp_url: str) -> AsyncIterator[System]:
    system = System(Harness(connect=lambda: AmqpBroker(f"{amqp_url}?heartbeat=1"), quiet=0.25))
    yield system
    await system.close()


@pytest_asyncio.fixture
async def broker(system: System) -> Broker:
    return await system.connect()
