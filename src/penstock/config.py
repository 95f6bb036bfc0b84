"""Where a setting comes from: flag, then environment, then `penstock.toml`, then default."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import msgspec

from penstock.errors import ConfigError, near

FILE = "penstock.toml"
DEFAULT_DATABASE = "penstock.db"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of `penstock.toml`; each is also an environment variable `PENSTOCK_<KEY>`."""

    broker: str | None = None
    store: str | None = None
    log_level: str = "info"
    log_format: str = "console"
    processes: int = 1


def load(start: Path | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration of a directory and an environment.

    :raises ConfigError: a file that is not TOML, an unknown key (the near one is suggested), a bad value.
    """
    environ = os.environ if environ is None else environ
    path = find_file(start)
    written = {} if path is None else _read(path)
    _convert(written, str(path))
    told = {key: secret(f"PENSTOCK_{key.upper()}", environ) for key in Config.__struct_fields__}
    told = {key: value for key, value in told.items() if value is not None}
    for key, value in told.items():
        _convert({key: value}, f"PENSTOCK_{key.upper()}")
    return _convert({**written, **told}, "")


def _convert(values: Mapping[str, Any], where: str) -> Config:
    try:
        return msgspec.convert(dict(values), Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None


def find_file(start: Path | None = None) -> Path | None:
    """The nearest `penstock.toml`, from `start` (default: here) upwards."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / FILE).is_file():
            return folder / FILE
    return None


def default_broker(start: Path | None = None) -> str:
    """The URL of one SQLite file: beside `penstock.toml` if there is one above, else here."""
    path = find_file(start)
    folder = path.parent if path else (start or Path.cwd()).resolve()
    return f"sqlite:///{quote(str(folder / DEFAULT_DATABASE))}"  # a path may hold what means something in a URL


def secret(name: str, environ: Mapping[str, str]) -> str | None:
    """An environment variable, or what the file that `<name>_FILE` names holds.

    :raises ConfigError: a file that cannot be read.
    """
    if name in environ:
        return environ[name]
    path = environ.get(f"{name}_FILE")
    if path is None:
        return None
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise ConfigError(f"{name}_FILE: cannot read {path}: {error.strerror}") from None


class URL(msgspec.Struct, frozen=True):
    """A broker's or store's URL in parts. `query` holds the driver's options."""

    scheme: str
    host: str | None
    port: int | None
    user: str | None
    password: str | None
    path: str
    query: dict[str, str]

    def options(self, known: Mapping[str, Any], what: str) -> dict[str, Any]:
        """The query's options converted to the types of `known` (name → type).

        :raises ConfigError: an unknown option (the near one is suggested) or a value of another type.
        """
        found = {}
        for name, value in self.query.items():
            if name not in known:
                raise ConfigError(f"{what} has no option {name!r}{near(name, known)}")
            try:
                found[name] = msgspec.convert(value, known[name], strict=False)
            except msgspec.ValidationError as error:
                raise ConfigError(f"{what} option {name}={value!r}: {error}") from None
        return found


def parse_url(text: str) -> URL:
    """:raises ConfigError: not a URL."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{mask(text)!r} is not a URL: {error}") from None
    if not parts.scheme or "://" not in text:
        raise ConfigError(f"{mask(text)!r} is not a URL: write it as scheme://…, such as sqlite:///penstock.db")
    return URL(
        scheme=parts.scheme.lower(),
        host=parts.hostname,
        port=port,
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        path=unquote(parts.path),
        query=dict(parse_qsl(parts.query, keep_blank_values=True)),
    )


def amqp_url(host: str = "127.0.0.1", port: int = 5672, user: str = "guest", password: str = "guest") -> str:  # noqa: S107 - RabbitMQ's own default account
    """The URL of `App(host=…, port=…, user=…, password=…)`."""
    return f"amqp://{quote(user, safe='')}:{quote(password, safe='')}@{host}:{port}/"


def named(url: str, name: str) -> str:
    """`memory://`, which is another system for each that connects, under a name that several can use; any other
    URL as it is."""
    scheme, separator, rest = url.partition("://")
    if scheme.lower() != "memory" or (rest and not rest.startswith("?")):
        return url
    return f"{scheme}{separator}{quote(name)}{rest}"


def mask(url: str) -> str:
    """A URL fit for a log: its password replaced by stars."""
    head, separator, rest = url.partition("://")
    userinfo, at, tail = rest.rpartition("@")
    if not at or ":" not in userinfo:
        return url
    return f"{head}{separator}{userinfo.partition(':')[0]}:***@{tail}"


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    for key in values:
        if key not in Config.__struct_fields__:
            raise ConfigError(f"{path}: unknown key {key!r}{near(key, Config.__struct_fields__)}")
    for key in ("broker", "store"):
        if isinstance(values.get(key), str):
            values[key] = _anchored(values[key], path.parent)
    return values


def _anchored(url: str, folder: Path) -> str:
    """A relative SQLite file is beside the file that names it, whatever directory a command runs in."""
    prefix = "sqlite:///"
    if not url.startswith(prefix) or url.startswith((prefix + "/", prefix + "~")):
        return url
    return f"{prefix}{quote(str(folder))}/{url.removeprefix(prefix)}"
