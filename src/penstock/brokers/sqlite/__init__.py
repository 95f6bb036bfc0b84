"""`sqlite:///file.db`: one durable file, shared by the processes of one machine."""

from penstock.brokers.sqlite.broker import SqliteBroker

__all__ = ["SqliteBroker"]
