"""Faults from outside, for tests of what survives them.

`Ledger` is a file of what really happened, `Processes` are consumers to be killed, `Proxy` is a line
to be cut, and `RabbitNode` is a server to be killed, stopped, frozen and starved.
"""

from penstock.testing.faults.ledger import Entry, Ledger
from penstock.testing.faults.processes import Processes
from penstock.testing.faults.proxy import Proxy
from penstock.testing.faults.rabbitmq import QueueFigures, RabbitNode, find_server
from penstock.testing.faults.waiting import seconds_until, wait_until

__all__ = [
    "Entry",
    "Ledger",
    "Processes",
    "Proxy",
    "QueueFigures",
    "RabbitNode",
    "find_server",
    "seconds_until",
    "wait_until",
]
