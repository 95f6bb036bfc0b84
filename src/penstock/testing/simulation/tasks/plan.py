"""What a seed decides beforehand of a world of tasks."""

from __future__ import annotations

import random
from typing import Any, Literal

import msgspec

from penstock.tasks.definition import TaskPolicy
from penstock.tasks.limits import Rate

ALPHA, BETA, TICK = "alpha", "beta", "tick"
"""Two tasks that are sent, and the one of the schedule."""
BOTH = "both"
"""The topic that two tasks are on."""
QUEUES = {ALPHA: (ALPHA,), BETA: (BETA,), BOTH: (ALPHA, BETA), TICK: (TICK,)}
"""Topic → the queues on it."""

LEASE = 2.0  # virtual seconds, like all below
FAULTY_FOR = 35.0
CALM_FOR = 25.0
"""Without faults, until the schedules end: a claim that a dead process left is taken over meanwhile."""
LOST_AFTER = 45.0
"""With nothing in the broker any more: what has not ended by then never will."""
CALM_WITHIN = 900.0
ENDLESS = 3600.0

Verb = Literal["suspend", "resume", "cancel"]
Kind = Literal["plain", "stubborn", "poison", "misfit", "endless"]
"""`stubborn` always fails, `poison` kills its process, `misfit` cannot be decoded, `endless` ends only when
it is stopped."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """A task that will be sent."""

    id: str
    topic: str
    kind: Kind
    pause: float
    """Since the one before."""
    timeout: float
    """Within which `send` has to be done."""
    delay: float | None
    expires: float | None
    unique: str | None
    retries: int | None
    cancel_after: float | None
    waits: bool
    """Its sender waits for its end."""
    steps: int
    """Of the transaction in each of its runs; 0: none."""
    orders: tuple[tuple[float, Verb], ...]
    """What is wanted of its transactions, and when, since the beginning."""


class Plan(msgspec.Struct, frozen=True):
    """What a seed decides beforehand."""

    senders: list[list[Spec]]
    processes: int
    policies: dict[str, TaskPolicy]
    every: float
    grace: float
    """That a process takes for its end."""
    chance: dict[str, float]
    """Of each fault, each time it could happen."""

    @property
    def specs(self) -> dict[str, Spec]:
        return {spec.id: spec for specs in self.senders for spec in specs}

    @classmethod
    def draw(cls, rng: random.Random) -> Plan:
        policies = {name: _policy(rng) for name in (ALPHA, BETA)}
        policies[TICK] = _policy(rng, limited=False)
        return cls(
            senders=[[_spec(rng, sender, n) for n in range(rng.randint(4, 9))] for sender in range(2)],
            processes=rng.randint(1, 3),
            policies=policies,
            every=rng.choice([3.0, 7.0]),
            grace=rng.choice([0.5, 5.0]),
            chance={
                "crash": rng.choice([0.0, 0.0005, 0.002]),
                "drain": rng.choice([0.0, 0.0003, 0.001]),
                "lost lease": rng.choice([0.0, 0.001, 0.004]),
                "task error": rng.choice([0.0, 0.05, 0.2]),
                "outage": rng.choice([0.0, 0.03]),
                "cancelled": rng.choice([0.0, 0.03]),
                "block skipped": rng.choice([0.0, 0.0, 0.2]),
                "gives up": rng.choice([0.0, 0.1]),
                "unanswered": rng.choice([0.0, 0.02, 0.1]),
                "broker error": rng.choice([0.0, 0.02, 0.1]),
                "doubled": rng.choice([0.0, 0.05]),
                "reordered": rng.choice([0.0, 0.3]),
                "store error": rng.choice([0.0, 0.02, 0.1]),
                "store half done": rng.choice([0.0, 0.02]),
                "store away": rng.choice([0.0, 0.001]),
                "watch broken": rng.choice([0.0, 0.1]),
                "watch confused": rng.choice([0.0, 0.1]),
            },
        )


def _policy(rng: random.Random, *, limited: bool = True) -> TaskPolicy:
    options: dict[str, Any] = {
        "retries": rng.randint(0, 3),
        "backoff": (0.2, 3.0),
        "concurrency": rng.randint(1, 3),
        "timeout": rng.choice([None, 4.0]),
    }
    if limited:
        options["cluster_limit"] = rng.choice([None, None, 1, 2])
        options["rate_limit"] = rng.choice([None, None, None, Rate(1.0, 1.0)])
    return TaskPolicy(**options)


def _spec(rng: random.Random, sender: int, number: int) -> Spec:
    verbs: tuple[Verb, ...] = ("suspend", "resume", "resume", "cancel")
    kinds: tuple[Kind, ...] = ("plain", "stubborn", "poison", "misfit", "endless")
    return Spec(
        id=f"{sender}-{number}",
        topic=rng.choice([ALPHA, BETA, BOTH]),
        kind=rng.choices(kinds, (20, 1, 1, 1, 1))[0],
        pause=rng.choice([0.0, 0.5, 4.0]),
        timeout=rng.choice([2.0, 30.0]),
        delay=rng.choice([None, None, 1.5]),
        expires=rng.choice([None, None, 0.5, 4.0]),
        unique=rng.choice([None, None, "a", "b"]),
        retries=rng.choice([None, 0, 2]),
        cancel_after=rng.choice([None, None, 0.0, 0.5, 3.0]),
        waits=rng.random() < 0.5,
        steps=rng.choice([0, 0, 0, 2, 3]),
        orders=tuple((rng.uniform(0.0, FAULTY_FOR), rng.choice(verbs)) for _ in range(rng.choice([0, 0, 1, 3]))),
    )
