"""RabbitMQ keeps the contract: the whole suite on the real server."""

from __future__ import annotations

import pytest

from penstock.brokers.amqp import AmqpBroker
from penstock.testing import victim
from penstock.testing.conformance import Conformance, Harness


class TestAmqp(Conformance):
    @pytest.fixture
    def harness(self, amqp_url: str) -> Harness:
        url = f"{amqp_url}?heartbeat=1"  # the server gives up on a frozen event loop after two of them
        return Harness(
            connect=lambda: AmqpBroker(url), crash_consumer=victim.killed(url), lease=3.0, quiet=0.25, prompt=1.5
        )
