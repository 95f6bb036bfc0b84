"""Tasks, transactions and a schedule under seeded faults: `python -m penstock.testing.simulation --tasks SEED`.

Some simulated processes run tasks, put together as an app puts them together, over a broker and a store that
fail as they can; others send tasks, wait for them and cancel them; somebody suspends, resumes and cancels their
transactions. Every change of the store is checked when it is made. At the end, with the faults over, every task that
came into the broker must have ended, and its record, and that of its transaction, must say how.
"""

from __future__ import annotations

from penstock.testing.simulation.play import play
from penstock.testing.simulation.tasks.world import TaskWorld

__all__ = ["TaskWorld", "simulate_tasks"]


def simulate_tasks(seed: int) -> TaskWorld:
    """Play one seed of the world of tasks; the world afterwards.

    :raises Violation: a promise was broken; says how to replay it.
    """
    return play(TaskWorld, seed)
