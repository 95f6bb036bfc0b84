"""NATS keeps the contract: the whole suite on the real server."""

from __future__ import annotations

import pytest

from penstock.brokers.nats import NatsBroker
from penstock.testing import victim
from penstock.testing.conformance import Conformance, Harness


class TestNats(Conformance):
    @pytest.fixture
    def harness(self, nats_url: str) -> Harness:
        return Harness(
            connect=lambda: NatsBroker(nats_url),
            crash_consumer=victim.killed(nats_url),
            lease=1.5,
            quiet=0.15,
            largest_body=900 * 1024,  # the server takes 1 MiB with headers
        )
