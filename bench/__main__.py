"""`python -m bench [sqlite] [rabbitmq]`: ratios against the raw client; exit status 1 below a target."""

from __future__ import annotations

import sys

from bench import on_rabbitmq, on_sqlite
from bench.report import Report

SYSTEMS = {"sqlite": on_sqlite.run, "rabbitmq": on_rabbitmq.run}


def main() -> int:
    unknown = set(sys.argv[1:]) - set(SYSTEMS)
    if unknown:
        print(f"error: no benchmark of {', '.join(unknown)}; there are {', '.join(SYSTEMS)}", file=sys.stderr)
        return 2
    report = Report()
    for name in sys.argv[1:] or SYSTEMS:
        SYSTEMS[name](report)
    return int(report.missed)


if __name__ == "__main__":
    sys.exit(main())
