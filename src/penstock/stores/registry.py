"""URL → adapter, imported on use. The one place that names adapters."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from penstock.config import parse_url
from penstock.errors import ConfigError, near
from penstock.stores.base import Store, StoreAdapter


class Known(NamedTuple):
    """Where an adapter lives and what `pip install penstock[…]` it needs."""

    module: str
    adapter: str
    extra: str | None


ADAPTERS = {
    "memory": Known("penstock.stores.memory", "MemoryStore", None),
    "postgres": Known("penstock.stores.postgres", "PostgresStore", "postgres"),
    "postgresql": Known("penstock.stores.postgres", "PostgresStore", "postgres"),
    "redis": Known("penstock.stores.redis", "RedisStore", "redis"),
    "redis+unix": Known("penstock.stores.redis", "RedisStore", "redis"),
    "rediss": Known("penstock.stores.redis", "RedisStore", "redis"),
    "sqlite": Known("penstock.stores.sqlite", "SqliteStore", None),
    "unix": Known("penstock.stores.redis", "RedisStore", "redis"),
}


def check(url: str) -> Known:
    """The adapter of a URL, without importing it.

    :raises ConfigError: not a URL, or a scheme that no adapter serves.
    """
    scheme = parse_url(url).scheme
    if scheme not in ADAPTERS:
        raise ConfigError(f"no store for {scheme}:// URLs{near(scheme, ADAPTERS)}; there are {', '.join(ADAPTERS)}")
    return ADAPTERS[scheme]


def connect(url: str) -> Store:
    """A store for a URL, not yet opened.

    :raises ConfigError: an unknown scheme, a missing extra, a URL that can never work.
    """
    known = check(url)
    try:
        module = importlib.import_module(known.module)
    except ModuleNotFoundError as error:
        if known.extra is None or (error.name or "").startswith("penstock"):
            raise
        raise ConfigError(f"{error.name} is missing: pip install 'penstock[{known.extra}]'") from None
    adapter: StoreAdapter = getattr(module, known.adapter)
    return adapter(url)


def serves(url: str) -> bool:
    """Whether a broker's URL can be that of a store too."""
    return parse_url(url).scheme in ADAPTERS
