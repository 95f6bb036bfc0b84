"""Connections for an operator: one broker for one command."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol, runtime_checkable

from penstock.brokers import registry
from penstock.brokers.base import Admin, Broker
from penstock.config import mask, parse_url
from penstock.errors import BrokerRefused, Unsupported


@runtime_checkable
class FileBroker(Protocol):
    """A message system that is a file."""

    path: str


def database(url: str) -> str | None:
    """The file behind a URL, where the message system is one.

    :raises ConfigError: a URL that no adapter serves.
    """
    broker = registry.connect(url)
    return os.path.abspath(broker.path) if isinstance(broker, FileBroker) else None


def missing_file(url: str) -> str | None:
    """The file behind a URL, where there should be one and there is none yet.

    :raises ConfigError: a URL that no adapter serves.
    """
    path = database(url)
    return path if path is not None and not os.path.exists(path) else None


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
