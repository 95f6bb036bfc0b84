"""`postgresql://…`: a store in a schema of a database, also the one that the broker uses."""

from penstock.stores.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
