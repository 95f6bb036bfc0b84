"""Connections for an operator: one broker or store for one command."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol, runtime_checkable

from penstock.brokers import registry
from penstock.brokers.base import Admin, Broker
from penstock.config import mask, parse_url
from penstock.errors import BrokerRefused, Unsupported
from penstock.stores import registry as stores
from penstock.stores.ledger import Ledger


@runtime_checkable
class InFile(Protocol):
    """A message system or store that is a file."""

    path: str


def database(url: str) -> str | None:
    """The file behind a URL, where the message system is one.

    :raises ConfigError: a URL that no adapter serves.
    """
    return _path(registry.connect(url))


def store_file(url: str) -> str | None:
    """The file behind a store's URL, where the store is one.

    :raises ConfigError: a URL that no adapter serves.
    """
    return _path(stores.connect(url))


def missing_file(url: str) -> str | None:
    """The file behind a URL, where there should be one and there is none yet.

    :raises ConfigError: a URL that no adapter serves.
    """
    return _missing(database(url))


def missing_store_file(url: str) -> str | None:
    """The same for a store.

    :raises ConfigError: a URL that no adapter serves.
    """
    return _missing(store_file(url))


def require_files(url: str, store: str | None = None) -> None:
    """Where message system or store is a file that does not exist, nobody is there to take anything: make none.

    :raises BrokerRefused: a file is missing.
    :raises ConfigError: a URL that no adapter serves.
    """
    missing, flag = missing_file(url), "--broker"
    if missing is None and store is not None:
        missing, flag = missing_store_file(store), "--store"
    if missing is not None:
        raise BrokerRefused(f"there is no file {missing}: start a consumer once, or check the directory and {flag}")


@asynccontextmanager
async def connected(url: str, vhost: str | None = None) -> AsyncIterator[Broker]:
    """A connected broker. Where the message system is a file, that file exists: looking makes none.

    :raises ConfigError: a URL that no adapter serves.
    :raises BrokerUnavailable, BrokerRefused: as they say; it is not tried again.
    """
    missing = missing_file(url)
    if missing is not None:
        raise BrokerRefused(f"there is no file {missing}")
    broker = registry.connect(url, vhost=vhost)
    try:
        await broker.open()
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def remembered(url: str) -> AsyncIterator[Ledger]:
    """The ledger of a connected store. Where the store is a file, that file exists: looking makes none.

    :raises ConfigError: a URL that no adapter serves.
    :raises BrokerUnavailable, BrokerRefused: as they say; it is not tried again.
    """
    missing = missing_store_file(url)
    if missing is not None:
        raise BrokerRefused(f"there is no file {missing}")
    store = stores.connect(url)
    ledger = Ledger(store)
    try:
        await store.open()
        yield ledger
    finally:
        await ledger.close()
        await store.close()


def admin_of(broker: Broker, url: str) -> Admin:
    """:raises Unsupported: the system shows nothing to operators."""
    if broker.admin is None:
        raise Unsupported(f"{parse_url(url).scheme} ({mask(url)}) cannot list, purge or pause queues")
    return broker.admin


def listing_admin_of(broker: Broker, url: str) -> Admin:
    """:raises Unsupported: the system does not tell which queues there are."""
    admin = admin_of(broker, url)
    if not broker.capabilities.lists:
        raise Unsupported(f"{mask(url)} does not tell which queues there are: name them, as in penstock queues list Q")
    return admin


def _path(of: object) -> str | None:
    return os.path.abspath(of.path) if isinstance(of, InFile) else None


def _missing(path: str | None) -> str | None:
    return path if path is not None and not os.path.exists(path) else None
