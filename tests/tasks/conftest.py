"""Apps with tasks on every system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock import App


@pytest.fixture
def make_app(broker_url: str, tmp_path: Path) -> Callable[..., App]:
    """Impatient apps on that system; RabbitMQ and NATS, which can be no store, have one in a file beside it."""

    def make(**options: Any) -> App:
        if broker_url.startswith(("amqp:", "nats:")):
            options.setdefault("store", f"sqlite:///{tmp_path / 'store.db'}")
        return App(broker_url, **{"lease": 1.0, "grace": 5.0, **options})

    return make
