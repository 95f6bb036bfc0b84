"""`penstock nodes`."""

from __future__ import annotations

import time

from penstock.cli import remote
from penstock.cli.command import Call
from penstock.cli.output import print_json, print_table, seconds
from penstock.control.cluster import NodeView


def nodes(call: Call) -> None:
    """The nodes that live and share a store: who is the master, what each runs, when it was last heard of."""
    found = remote.required(call).get("/nodes", list[NodeView])
    if call.json:
        print_json(found)
        return
    now = time.time()
    rows = [
        [
            one.name,
            one.id,
            f"{one.host}:{one.pid}",
            one.version,
            one.url or "-",
            f"master, epoch {one.epoch}" if one.master else "",
            "ready" if one.ready else "not ready",
            str(one.workers),
            str(one.jobs),
            seconds(max(now - one.started_at, 0.0)),
            seconds(max(now - one.seen_at, 0.0)),
        ]
        for one in found
    ]
    headers = ["node", "id", "process", "version", "url", "", "state", "workers", "jobs", "up", "seen"]
    print_table(headers, rows, right=(7, 8, 9, 10))
