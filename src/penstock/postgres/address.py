"""The URLs of databases: `postgresql://user:password@host:5432/database?schema=name`."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from penstock.config import mask, parse_url
from penstock.errors import ConfigError

SCHEMA = "penstock"
LONGEST_SCHEMA = 48  # bytes: its name with a prefix is that of a channel, of 63 at most
CONNECT_TIMEOUT = 10.0
CONNECTIONS = 4

_OPTIONS = {"schema": str, "timeout": float, "connections": int, "vhost": str}
_DRIVER_OPTIONS = (
    *("application_name", "host", "passfile", "password", "port", "user", "database", "dbname"),
    *("sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslpassword", "ssl_min_protocol_version"),
    *("ssl_max_protocol_version", "sslnegotiation", "target_session_attrs", "krbsrvname", "gsslib"),
)
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")


class Address(NamedTuple):
    """A database, and the schema in it."""

    dsn: str
    """As the driver takes it."""
    schema: str
    timeout: float
    """Seconds for a connection to be made."""
    connections: int
    """At most so many for work, beside those that listen and say that we live."""
    shown: str
    """Fit for a log."""
    files: tuple[str, ...] = ()
    """Those that TLS needs."""


def parse_address(url: str, vhost: str | None = None) -> Address:
    """What a URL names. A `vhost` is a schema, and overrides the URL's.

    :raises ConfigError: an unknown option, or one that can never work.
    """
    parts = parse_url(url)
    options: dict[str, Any] = parts.options({**_OPTIONS, **dict.fromkeys(_DRIVER_OPTIONS, str)}, parts.scheme)
    asked = vhost if vhost is not None else options.get("vhost")
    schema = (asked or "").strip("/") or options.get("schema", SCHEMA)
    if not schema or "\0" in schema or len(schema.encode()) > LONGEST_SCHEMA or schema.startswith("pg_"):
        raise ConfigError(
            f"{schema!r} cannot be a schema's name: at most {LONGEST_SCHEMA} bytes, not beginning with pg_"
        )
    connections, timeout = options.get("connections", CONNECTIONS), options.get("timeout", CONNECT_TIMEOUT)
    if connections < 1:
        raise ConfigError(f"connections must be 1 or more, not {connections}")
    if not timeout > 0:
        raise ConfigError(f"timeout must be more than 0 seconds, not {timeout:g}")
    query = {name: options[name] for name in _DRIVER_OPTIONS if name in options}
    named = (("user", parts.user), ("password", parts.password), ("database", parts.path[1:]))
    for name, value in (*named, *query.items()):
        if value and "\0" in value:
            raise ConfigError(f"{name} cannot hold a null character")
    query.setdefault("application_name", "penstock")
    user = quote(parts.user, safe="") if parts.user else ""
    if parts.password:
        user += f":{quote(parts.password, safe='')}"
    host = parts.host or ("" if "host" in query else "127.0.0.1")
    if ":" in host:
        host = f"[{host}]"
    port = f":{parts.port}" if parts.port else ""
    dsn = f"postgresql://{user}{'@' if user else ''}{host}{port}/{quote(parts.path[1:], safe='')}?{urlencode(query)}"
    files = tuple(query[name] for name in _FILES if name in query)
    return Address(dsn, schema, timeout, connections, mask(url).partition("?")[0], files)


def quoted(name: str) -> str:
    """An identifier as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'
