"""`sqlite:///file.db`: a store in a SQLite file, also the one that the broker uses."""

from penstock.stores.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
