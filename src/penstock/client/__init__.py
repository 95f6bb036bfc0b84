"""The calling side: publishing, from async code and from blocking code."""

from penstock.client.client import Client
from penstock.client.sync import SyncClient

__all__ = ["Client", "SyncClient"]
