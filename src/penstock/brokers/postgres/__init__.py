"""`postgresql://user:password@host/database`: queues in a schema of a database that is there anyway."""

from penstock.brokers.postgres.broker import PostgresBroker

__all__ = ["PostgresBroker"]
