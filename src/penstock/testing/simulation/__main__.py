"""Replay seeds: `python -m penstock.testing.simulation SEED …`."""

from __future__ import annotations

import logging
import sys

from penstock.testing.simulation import Violation, simulate


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    status = 0
    for text in sys.argv[1:]:
        try:
            world = simulate(int(text))
        except Violation as violation:
            print(f"VIOLATION {violation}", file=sys.stderr)
            status = 1
        else:
            print(f"seed {text}: {world.steps} steps, {sum(world.finished.values())} finished, dead {world.buried}")
    return status


if __name__ == "__main__":
    sys.exit(main())
