"""Where a node on this machine is, and the token that it made up, in a file for its user alone, where the command line
finds it.

One file a port, below `$XDG_RUNTIME_DIR`, `$XDG_STATE_HOME/penstock` or `~/.local/state/penstock`. All of it blocks.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from penstock.config import mask, parse_url
from penstock.errors import ConfigError

DEFAULT_PORT = 8470
MOST = 65_536  # bytes of a file


class Told(msgspec.Struct, frozen=True):
    """How to reach a node on this machine."""

    url: str
    token: str | None
    """None: somebody configured one."""
    pid: int

    def __repr__(self) -> str:
        return f"Told(url={self.url!r}, pid={self.pid})"


def folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where these files are written."""
    return folders(environ)[0]


def folders(environ: Mapping[str, str] | None = None) -> list[Path]:
    """Where they are looked for: a node that systemd or cron has started knows of fewer than a login shell."""
    environ = os.environ if environ is None else environ
    told = [environ.get(name, "") for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME")]
    found = [Path(path) / "penstock" for path in told if os.path.isabs(path)]  # others are ignored, as XDG has it
    home = environ.get("HOME") or os.path.expanduser("~")
    return [*found, Path(home) / ".local" / "state" / "penstock"]


def write(told: Told, where: Path | None = None) -> Path:
    """Keep it, at once whole, readable by this user only; where it is.

    :raises ConfigError: it cannot be written, or what is there belongs to somebody else.
    """
    where = where or folder()
    path = _file(where, _port(told.url))
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_folder(where)
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".new", dir=where)  # 0600 from the first moment
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(told))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"cannot keep the token in {path}: {error.strerror}") from None
    return path


def find(url: str | None = None, where: Path | None = None) -> Told | None:
    """What the node at `url` wrote; None: nothing, or it has gone, or it is on another machine.

    Without a URL: of the default port's, else of the only one there is.

    :raises ConfigError: a file that others could have read or written; not a URL.
    """
    places = folders() if where is None else [where]
    return next((told for place in places if (told := _find(url, place)) is not None), None)


def _find(url: str | None, where: Path) -> Told | None:
    if url is not None:
        return _read(_file(where, _port(url))) if is_local(url) else None
    found = _read(_file(where, DEFAULT_PORT))
    if found is not None:
        return found
    try:
        files = sorted(path for path in where.iterdir() if path.suffix == ".json" and path.stem.isdecimal())
    except OSError:
        return None
    living = [told for path in files if (told := _read(path)) is not None]
    return living[0] if len(living) == 1 else None


def remove(told: Told, where: Path | None = None) -> None:
    """Forget it, if it is still this one that is there. Idempotent."""
    path = _file(where or folder(), _port(told.url))
    try:
        if _parse(path) == told:
            path.unlink(missing_ok=True)
    except (ConfigError, OSError):
        pass  # somebody else's


def _read(path: Path) -> Told | None:
    """:raises ConfigError: others could have read or written it."""
    told = _parse(path)
    return told if told is not None and _lives(told.pid) else None


def _parse(path: Path) -> Told | None:
    """:raises ConfigError: others could have read or written it, or it says nothing."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read the token in {path}: {error.strerror}") from None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} is no plain file")
        if status.st_uid != os.geteuid():
            raise ConfigError(f"{path} belongs to another user: its token is not used")
        if status.st_mode & 0o077:
            raise ConfigError(f"others can open {path}: its token is not used; remove it and start the node again")
        text = file.read(MOST)
    try:
        return msgspec.json.decode(text, type=Told)
    except (msgspec.DecodeError, UnicodeError):
        raise ConfigError(f"{path} holds no token: remove it and start the node again") from None


def _check_folder(where: Path) -> None:
    """:raises ConfigError: somebody else could put files there."""
    status = os.lstat(where)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ConfigError(f"{where} must be a folder of this user's that no other can write to")


def _file(where: Path, port: int) -> Path:
    return where / f"{port}.json"


def _port(url: str) -> int:
    parts = parse_url(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def is_local(url: str) -> bool:
    """A token of this machine goes to no other."""
    parts = parse_url(url)
    if parts.host is None:
        raise ConfigError(f"{mask(url)!r} names no host")
    if parts.host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.host).is_loopback
    except ValueError:
        return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False  # the process is another's: ours has gone
    return True
