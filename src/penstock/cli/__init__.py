"""The command line: arguments in, lines out. What it does is done by `penstock.control`."""

from __future__ import annotations

import sys


def main() -> None:
    """The `penstock` command; ends the process. 0: ok, 1: failed, 2: wrongly used, 130: interrupted."""
    try:
        from penstock.cli.root import run

        status = run(sys.argv[1:])
    except KeyboardInterrupt:  # while modules are imported, or in the last moment
        status = 130
    sys.exit(status)
