"""What all consumers of a process share."""

from __future__ import annotations

import random

import msgspec

from penstock.brokers.base import Broker
from penstock.clock import SYSTEM_CLOCK, Clock
from penstock.delivery.suspects import Solitude


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What all consumers of a process share."""

    solitude: Solitude
    lease: float = 30.0
    max_body: int = 8 * 2**20
    dead_letters: Broker | None = None
    """The broker of dead letters; None: each queue's own."""
    clock: Clock = SYSTEM_CLOCK
    rng: random.Random = random.Random()  # noqa: S311 - jitter
