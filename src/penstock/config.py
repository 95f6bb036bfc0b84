"""Where a setting comes from: flag, then environment, then `penstock.toml`, then default."""

from __future__ import annotations

import logging
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import msgspec

from penstock.errors import ConfigError, near

log = logging.getLogger("penstock.config")

FILE = "penstock.toml"
DEFAULT_DATABASE = "penstock.db"
_TOKEN_SCHEMES = ("nats", "tls")
"""Of URLs whose user, without a password, is a secret."""
_NO_SCHEME = re.compile(r"(?<!\S)([^\s:]*:)\S+@")
"""What may be a user and a password where somebody mistyped a URL."""
_QUOTED = re.compile(r"(['\"]).*\1", re.S)
_refused: set[tuple[Path, str]] = set()
"""Files that a warning was given of, and why."""
_SECRET_OPTION = re.compile(r"([?&][^=&#]*(?:passw|secret|token|seed|api_?key)[^=&#]*=)[^&#]*", re.I)

Above0 = Annotated[int, msgspec.Meta(ge=1)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of `penstock.toml`; each is also an environment variable `PENSTOCK_<KEY>`."""

    broker: str | None = None
    store: str | None = None
    log_level: str = "info"
    log_format: str = "console"
    processes: int = 1
    url: str | None = None
    """Of the node that commands ask; empty: none."""

    # Of `penstock serve`.
    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8470
    allowed_hosts: str = ""
    """Further names that HTTP answers to, with commas between them."""
    install: bool = False
    worker_watch_interval: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    job_queue_size: Above0 = 65535
    job_queue_bulk_read_size: Above0 = 32
    amqp_url: str | None = None
    console: bool = False
    job_transaction_event: bool = False


class Setting(msgspec.Struct, frozen=True):
    """What a key is, and why."""

    name: str
    value: Any
    source: Literal["flag", "environment", "penstock.toml", "default"]
    where: str | None = None
    """The flag, the variable or the file."""


def load(start: Path | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration of a directory and an environment.

    :raises ConfigError: a file that is not TOML, an unknown key (the near one is suggested), a bad value.
    """
    written, told, path = _gather(start, environ)
    _convert(written, str(path))
    for key, (value, variable) in told.items():
        _convert({key: value}, variable.removesuffix("_FILE"))
    return _convert({**written, **{key: value for key, (value, _) in told.items()}}, "")


def explain(start: Path | None = None, environ: Mapping[str, str] | None = None) -> list[Setting]:
    """The same, key by key, each with where it comes from. Passwords are not masked.

    :raises ConfigError: as `load`.
    """
    found = load(start, environ)
    written, told, path = _gather(start, environ)
    settings: list[Setting] = []
    for key in Config.__struct_fields__:
        value = getattr(found, key)
        if key in told:
            settings.append(Setting(key, value, "environment", told[key][1]))
        elif key in written:
            settings.append(Setting(key, value, "penstock.toml", str(path)))
        else:
            settings.append(Setting(key, value, "default"))
    return settings


def _gather(
    start: Path | None, environ: Mapping[str, str] | None
) -> tuple[dict[str, Any], dict[str, tuple[str, str]], Path | None]:
    """What the file says, and where that is; what the environment says, and in which variable."""
    environ = os.environ if environ is None else environ
    path = find_file(start)
    told = {}
    for key in Config.__struct_fields__:
        variable = f"PENSTOCK_{key.upper()}"
        value = secret(variable, environ)
        if value is None or (key == "port" and value.startswith("tcp://")):
            continue  # Kubernetes sets PENSTOCK_PORT=tcp://… where a service is named penstock
        told[key] = value, variable if variable in environ else f"{variable}_FILE"
    return {} if path is None else _read(path), told, path


def _convert(values: Mapping[str, Any], where: str) -> Config:
    try:
        return msgspec.convert(dict(values), Config, strict=False)
    except msgspec.ValidationError as error:
        told, _, key = str(error).partition(" - at `$.")
        what = f"{key.rstrip('`')}: " if key and where.endswith(FILE) else ""
        raise ConfigError(f"{where}: {what}{told[:1].lower()}{told[1:]}") from None


def find_file(start: Path | None = None) -> Path | None:
    """The nearest `penstock.toml`, from `start` (default: here) upwards. One above `start` that somebody else owns or
    may write to is passed over, with a warning: it could send whoever works below, and what they send, anywhere."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        path = folder / FILE
        if not path.is_file():
            continue
        wrong = None if folder == here else _distrusted(path)
        if wrong is None:
            return path
        if (path, wrong) not in _refused:
            _refused.add((path, wrong))
            log.warning("%r is passed over: %s", str(path), wrong)
    return None


def _distrusted(path: Path) -> str | None:
    """Why a file may say what neither this user nor root wants. Where files have no owners, nobody can tell."""
    if not hasattr(os, "getuid"):
        return None
    try:
        for facts in (path.lstat(), path.stat()):  # a link is its owner's word too
            if facts.st_uid not in (0, os.getuid()):
                return f"user {facts.st_uid} owns it, and neither this user nor root"
            if not stat.S_ISLNK(facts.st_mode) and _shared(facts):
                return f"others may write to it (its mode is {stat.S_IMODE(facts.st_mode):o}): chmod go-w"
    except OSError as error:
        return f"{error.strerror}"
    return None


def _shared(facts: os.stat_result) -> bool:
    """Whether somebody other than its owner may write to a file."""
    if facts.st_mode & stat.S_IWOTH:
        return True
    return bool(facts.st_mode & stat.S_IWGRP) and not _is_alone(facts.st_uid, facts.st_gid)


def _is_alone(user: int, group: int) -> bool:
    """Whether a group is the user's own. Systems that give each user one let it write to what the user makes."""
    import grp
    import pwd

    try:
        name, found = pwd.getpwuid(user).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == name and set(found.gr_mem) <= {name}


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
    except UnicodeDecodeError:
        raise ConfigError(f"{name}_FILE: {path} is not text") from None


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


def unquoted(error: ValueError) -> str:
    """What `urlsplit` complains of, without what it quotes: that may be part of a password, of one with a slash say."""
    return _QUOTED.sub("***", str(error))


def parse_url(text: str) -> URL:
    """:raises ConfigError: not a URL."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{mask(text)!r} is not a URL: {unquoted(error)}") from None
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
    """A URL fit for a log: its password, its token and its secret options replaced by stars. Of what is no URL,
    whatever may have been meant as a password."""
    head, separator, rest = _SECRET_OPTION.sub(r"\1***", url).partition("://")
    if not separator:
        return _NO_SCHEME.sub(r"\1***@", head)
    if head.lower() in _TOKEN_SCHEMES:
        return f"{head}{separator}{_mask_tokens(rest)}"
    userinfo, at, tail = rest.rpartition("@")
    if not at or ":" not in userinfo:
        return f"{head}{separator}{rest}"
    return f"{head}{separator}{userinfo.partition(':')[0]}:***@{tail}"


def _mask_tokens(rest: str) -> str:
    """Of a server, and of those that its options list, all that stands before the @."""
    place, mark, options = rest.partition("?")
    if "=" not in options.partition("@")[0]:
        return _mask_user(rest)
    shown = []
    for item in re.split("([&,])", options):
        name, equals, value = item.partition("=")
        shown.append(f"{name}={_mask_user(value)}" if equals else _mask_user(name))
    return f"{_mask_user(place)}{mark}{''.join(shown)}"


def _mask_user(place: str) -> str:
    _, at, tail = place.replace("%40", "@").rpartition("@")
    return f"***@{tail}" if at else place


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    for key in values:
        if key == "token":
            raise ConfigError(f"{path}: a token is a secret: give it as PENSTOCK_TOKEN or PENSTOCK_TOKEN_FILE")
        if key not in Config.__struct_fields__:
            raise ConfigError(f"{path}: unknown key {key!r}{near(key, Config.__struct_fields__)}")
    for key in ("broker", "store"):
        if isinstance(values.get(key), str):
            values[key] = anchored(values[key], path.parent)
    return values


def anchored(url: str, folder: Path) -> str:
    """A relative SQLite file is beside the file that names it, whatever directory a command runs in."""
    prefix = "sqlite:///"
    if not url.startswith(prefix) or url.startswith((prefix + "/", prefix + "~")):
        return url
    return f"{prefix}{quote(str(folder))}/{url.removeprefix(prefix)}"
