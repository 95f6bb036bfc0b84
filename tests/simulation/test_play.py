"""A seed tells one story, whatever the process has done before."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from penstock.testing.simulation import simulate
from penstock.testing.simulation.ground import Ground
from penstock.testing.simulation.tasks import simulate_tasks

SEEDS = range(1700, 1708)


@pytest.mark.blocks
@pytest.mark.parametrize("play", [simulate, simulate_tasks])
def test_a_seed_is_played_alike_each_time(play: Callable[[int], Ground]) -> None:
    def told(seed: int) -> tuple[int, float, float]:
        world = play(seed)
        return world.steps, world.loop.now, world.rng.random()

    before = gc.get_threshold()
    first = {seed: told(seed) for seed in SEEDS}
    try:
        gc.set_threshold(50, 2, 2)  # coroutines that nobody resumes any more would be disposed of at other moments
        second = {seed: told(seed) for seed in reversed(SEEDS)}
    finally:
        gc.set_threshold(*before)
    assert first == second
