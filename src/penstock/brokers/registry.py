"""URL → adapter, imported on use. The one place that names adapters."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from penstock.brokers.base import Adapter, Broker
from penstock.config import parse_url
from penstock.errors import ConfigError, near


class Entry(NamedTuple):
    """Where an adapter lives and what `pip install penstock[…]` it needs."""

    module: str
    adapter: str
    extra: str | None


ADAPTERS = {
    "amqp": Entry("penstock.brokers.amqp", "AmqpBroker", "rabbitmq"),
    "amqps": Entry("penstock.brokers.amqp", "AmqpBroker", "rabbitmq"),
    "memory": Entry("penstock.brokers.memory", "MemoryBroker", None),
    "nats": Entry("penstock.brokers.nats", "NatsBroker", "nats"),
    "postgres": Entry("penstock.brokers.postgres", "PostgresBroker", "postgres"),
    "postgresql": Entry("penstock.brokers.postgres", "PostgresBroker", "postgres"),
    "redis": Entry("penstock.brokers.redis", "RedisBroker", "redis"),
    "redis+unix": Entry("penstock.brokers.redis", "RedisBroker", "redis"),
    "rediss": Entry("penstock.brokers.redis", "RedisBroker", "redis"),
    "sqlite": Entry("penstock.brokers.sqlite", "SqliteBroker", None),
    "tls": Entry("penstock.brokers.nats", "NatsBroker", "nats"),
    "unix": Entry("penstock.brokers.redis", "RedisBroker", "redis"),
}


def check(url: str) -> Entry:
    """The adapter of a URL, without importing it.

    :raises ConfigError: not a URL, or a scheme that no adapter serves.
    """
    scheme = parse_url(url).scheme
    if scheme not in ADAPTERS:
        raise ConfigError(f"no broker for {scheme}:// URLs{near(scheme, ADAPTERS)}; there are {', '.join(ADAPTERS)}")
    return ADAPTERS[scheme]


def connect(url: str, *, vhost: str | None = None) -> Broker:
    """A broker for a URL, not yet opened. `vhost` overrides the URL's.

    :raises ConfigError: an unknown scheme, a missing extra, a URL that can never work.
    """
    entry = check(url)
    try:
        module = importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        if entry.extra is None or (error.name or "").startswith("penstock"):
            raise
        raise ConfigError(f"{error.name} is missing: pip install 'penstock[{entry.extra}]'") from None
    adapter: Adapter = getattr(module, entry.adapter)
    return adapter(url, vhost=vhost)
