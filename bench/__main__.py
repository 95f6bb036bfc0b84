"""`python -m bench [sqlite] [rabbitmq] [redis] [nats] [postgres] [node]`: ratios against the raw client; exit status 1
below a target."""

from __future__ import annotations

import sys

from bench import on_nats, on_node, on_postgres, on_rabbitmq, on_redis, on_sqlite
from bench.report import Report

SYSTEMS = {
    "sqlite": on_sqlite.run,
    "rabbitmq": on_rabbitmq.run,
    "redis": on_redis.run,
    "nats": on_nats.run,
    "postgres": on_postgres.run,
    "node": on_node.run,
}


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
