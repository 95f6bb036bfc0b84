"""Faults from outside, for tests of what survives them.

`Ledger` is a file of what really happened, `Processes` are consumers to be killed, `halt` makes one stand still,
`Proxy` is a line to be cut, and `RabbitNode`, `RedisNode`, `NatsNode` (`NatsCluster`: three of them) and `PostgresNode`
are servers to be killed, stopped and frozen.
"""

from penstock.testing.faults.halting import halt
from penstock.testing.faults.ledger import Entry, Ledger
from penstock.testing.faults.nats import ClusterNode, NatsCluster, NatsNode, find_nats_server
from penstock.testing.faults.postgres import PostgresNode, find_postgres
from penstock.testing.faults.processes import Processes
from penstock.testing.faults.proxy import Proxy
from penstock.testing.faults.rabbitmq import QueueFigures, RabbitNode, find_server
from penstock.testing.faults.redis import RedisNode, find_redis
from penstock.testing.faults.waiting import seconds_until, wait_until

__all__ = [
    "ClusterNode",
    "Entry",
    "Ledger",
    "NatsCluster",
    "NatsNode",
    "PostgresNode",
    "Processes",
    "Proxy",
    "QueueFigures",
    "RabbitNode",
    "RedisNode",
    "find_nats_server",
    "find_postgres",
    "find_redis",
    "find_server",
    "halt",
    "seconds_until",
    "wait_until",
]
