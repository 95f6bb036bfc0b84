"""Replay seeds: `python -m penstock.testing.simulation [--tasks] SEED …`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter

from penstock.testing.simulation import Violation, simulate
from penstock.testing.simulation.tasks import simulate_tasks


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m penstock.testing.simulation", description=__doc__)
    parser.add_argument("--tasks", action="store_true", help="the world of tasks and schedules, not that of routes")
    parser.add_argument("seeds", metavar="SEED", type=int, nargs="+")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    status = 0
    for seed in asked.seeds:
        try:
            story = _of_tasks(seed) if asked.tasks else _of_routes(seed)
        except Violation as violation:
            print(f"VIOLATION {violation}", file=sys.stderr)
            status = 1
        else:
            print(f"seed {seed}: {story}")
    return status


def _of_routes(seed: int) -> str:
    world = simulate(seed)
    return f"{world.steps} steps, {sum(world.finished.values())} finished, dead {world.buried}"


def _of_tasks(seed: int) -> str:
    world = simulate_tasks(seed)
    ends = ", ".join(f"{count} {state}" for state, count in sorted(Counter(world.audit.ended.values()).items()))
    return f"{world.steps} steps in {world.loop.now:.0f} s, {ends}"


if __name__ == "__main__":
    sys.exit(main())
