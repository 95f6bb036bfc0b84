"""`memory://`: a broker in this process, for tests, simulations and single-process tools.

Messages are really encoded on the way in and decoded on the way out, so the codec path is the one of
every other system. `memory://name` is shared by all that name it in this process; `memory://` alone
is nobody else's. Nothing survives the process.
"""

from penstock.brokers.memory.broker import MemoryBroker, MemorySubscription
from penstock.brokers.memory.server import MemoryServer

__all__ = ["MemoryBroker", "MemoryServer", "MemorySubscription"]
