"""What a seed decides beforehand, and what it says when a promise breaks."""

from __future__ import annotations

import random

import msgspec

from penstock.delivery.route import Policy
from penstock.delivery.suspects import suspect_queue

QUEUE = "work"
LANE = suspect_queue(QUEUE)
LEASE = 2.0  # virtual seconds, like all below
FAULTY_FOR = 40.0
CALM_WITHIN = 2000.0


class Violation(AssertionError):
    """A promise was broken."""

    def __init__(self, seed: int, what: str, option: str = "") -> None:
        how = f"{option} {seed}".strip()
        super().__init__(f"seed {seed}: {what}; replay with: python -m penstock.testing.simulation {how}")


class Plan(msgspec.Struct, frozen=True):
    """What a seed decides beforehand."""

    messages: int
    processes: int
    batches: bool
    policy: Policy
    prefetch: int
    poison: frozenset[str]
    invalid: frozenset[str]
    stubborn: frozenset[str]
    """These always fail."""
    chance: dict[str, float]
    """Of each fault, each time it could happen."""

    @classmethod
    def draw(cls, rng: random.Random) -> Plan:
        messages = rng.randint(8, 24)
        ids = [str(n) for n in range(messages)]
        special = rng.sample(ids, 3)
        concurrency = rng.randint(1, 4)
        policy = Policy(
            bulk_size=rng.randint(1, 6),
            bulk_timeout=rng.choice([0.1, 1.0]),
            concurrency=concurrency,
            max_attempts=rng.randint(2, 5),
            backoff=(0.2, 3.0),
            ordered=rng.random() < 0.25,
        )
        return cls(
            messages=messages,
            processes=rng.randint(1, 3),
            batches=rng.random() < 0.5,
            policy=policy,
            prefetch=rng.randint(concurrency, 12),
            poison=frozenset(special[:1] if rng.random() < 0.3 else ()),
            invalid=frozenset(special[1:2] if rng.random() < 0.3 else ()),
            stubborn=frozenset(special[2:] if rng.random() < 0.3 else ()),
            chance={
                "crash": rng.choice([0.0, 0.0005, 0.003]),
                "drain": rng.choice([0.0, 0.0005, 0.002]),
                "lost lease": rng.choice([0.0, 0.0005, 0.002]),
                "handler error": rng.choice([0.0, 0.05, 0.2]),
                "reject": rng.choice([0.0, 0.05]),
                "outage": rng.choice([0.0, 0.05]),
                "cancelled": rng.choice([0.0, 0.03]),
                "broker error": rng.choice([0.0, 0.02, 0.1]),
                "doubled": rng.choice([0.0, 0.05]),
                "reordered": rng.choice([0.0, 0.3]),
            },
        )
