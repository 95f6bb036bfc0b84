"""The URLs of Redis servers: `redis://`, `rediss://` (TLS), `redis+unix://` and `unix://` (a socket)."""

from __future__ import annotations

import ssl
from urllib.parse import quote

import msgspec

from penstock.config import parse_url
from penstock.errors import BrokerRefused, ConfigError

PORT = 6379
TIMEOUT = 10.0
"""Seconds without an answer after which a connection counts as broken."""

OPTIONS = {
    "vhost": str,
    "db": int,
    "timeout": float,
    "ssl_ca_certs": str,
    "ssl_certfile": str,
    "ssl_keyfile": str,
    "ssl_cert_reqs": str,
    "ssl_check_hostname": bool,
    "evictable": bool,
}


class Address(msgspec.Struct, frozen=True):
    """A server, an account, a database and a namespace in it."""

    host: str
    port: int
    path: str | None
    """Of a socket; None: TCP."""
    user: str | None
    password: str | None
    database: int
    namespace: str
    timeout: float
    evictable: bool
    """Whether a server that may evict keys is taken all the same."""
    tls: dict[str, str | bool] | None

    @property
    def name(self) -> str:
        """As errors and logs say it."""
        return self.path or f"{self.host}:{self.port}"

    def prefix(self, room: str) -> str:
        """What all keys of a room (`penstock`, say) in this namespace begin with. It is a hash tag: in a Redis
        Cluster they are all on one node, and scripts may touch any of them."""
        return f"{{{room}:{quote(self.namespace, safe='')}}}:" if self.namespace else f"{{{room}}}:"

    def channels(self, room: str) -> str:
        """What its channels begin with. They are common to all databases, so it names ours."""
        return f"{self.prefix(room)}{self.database}:"

    def ssl_context(self) -> ssl.SSLContext | None:
        """Reads files.

        :raises BrokerRefused: certificates that cannot be read.
        """
        if self.tls is None:
            return None
        try:
            context = ssl.create_default_context(cafile=_text(self.tls.get("ssl_ca_certs")))
            certificate = _text(self.tls.get("ssl_certfile"))
            if certificate is not None:
                context.load_cert_chain(certificate, _text(self.tls.get("ssl_keyfile")))
        except OSError as error:
            reason = error.strerror or str(error)
            raise BrokerRefused(f"the certificates for {self.name} cannot be read: {reason}") from None
        if self.tls.get("ssl_check_hostname") is False or self.tls.get("ssl_cert_reqs") == "none":
            context.check_hostname = False
        if self.tls.get("ssl_cert_reqs") == "none":
            context.verify_mode = ssl.CERT_NONE
        return context


def _text(value: str | bool | None) -> str | None:
    return value if isinstance(value, str) else None


def parse_address(url: str, vhost: str | None = None) -> Address:
    """What a URL names. `vhost` overrides the URL's.

    :raises ConfigError: an unknown option, a database that is no number, TLS options without TLS.
    """
    parts = parse_url(url)
    options = parts.options(OPTIONS, "redis")
    is_socket = parts.scheme in ("unix", "redis+unix")
    if is_socket and (parts.host or not parts.path.strip("/")):
        raise ConfigError(f"{parts.scheme}:// names no socket: write {parts.scheme}:///run/redis/redis.sock?db=0")
    tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
    if tls and parts.scheme != "rediss":
        raise ConfigError(f"redis option {next(iter(tls))!r} needs TLS: write rediss://")
    if tls.get("ssl_cert_reqs") not in (None, "none", "required"):
        raise ConfigError(f"redis option ssl_cert_reqs={tls['ssl_cert_reqs']!r}: it is none or required")
    timeout = options.get("timeout", TIMEOUT)
    if not timeout > 0:
        raise ConfigError(f"redis option timeout={timeout:g}: it is a number of seconds above 0")
    return Address(
        host=parts.host or "127.0.0.1",
        port=parts.port or PORT,
        path=parts.path if is_socket else None,
        user=parts.user,
        password=parts.password,
        database=options.get("db", 0) if is_socket else _database(parts.path, options.get("db")),
        namespace=(vhost if vhost is not None else options.get("vhost", "")).strip("/"),
        timeout=timeout,
        evictable=options.get("evictable", False),
        tls=tls if parts.scheme == "rediss" else None,
    )


def _database(path: str, option: int | None) -> int:
    written = path.strip("/")
    if not written:
        return option or 0
    if not (written.isascii() and written.isdigit()) or (option is not None and option != int(written)):
        raise ConfigError(f"redis database {written!r} is not a number: write redis://host:6379/0?vhost={written}")
    return int(written)
