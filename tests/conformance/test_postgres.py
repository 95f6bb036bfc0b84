"""PostgreSQL keeps the contract: the whole suite on the real server."""

from __future__ import annotations

import pytest

from penstock.brokers.postgres import PostgresBroker
from penstock.testing import victim
from penstock.testing.conformance import Conformance, Harness


class TestPostgres(Conformance):
    @pytest.fixture
    def harness(self, postgres_url: str) -> Harness:
        return Harness(
            connect=lambda: PostgresBroker(postgres_url), crash_consumer=victim.killed(postgres_url), lease=1.0
        )
