"""What may be wrong with this machine, this configuration and this message system."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import platform
import shutil
import sqlite3
import sys
from collections.abc import AsyncIterator
from typing import Literal
from urllib.parse import quote

import msgspec

import penstock
from penstock import config
from penstock.brokers.base import Capabilities
from penstock.control.brokers import connected, database, remembered, store_file
from penstock.errors import PenstockError

Health = Literal["ok", "note", "warning", "failed"]

FIXED_SQLITE = (3, 51, 3)
"""The first SQLite without the WAL-reset fault."""
WHOLE_CHECK = 2**30  # bytes up to which a file is checked with its indexes
LOW_DISK, NO_DISK = 2**30, 64 * 2**20  # bytes free: a warning, a failure


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    what: str
    health: Health
    detail: str


async def examine(url: str, store: str | None = None) -> AsyncIterator[Finding]:
    """Look at everything, the quick things first. Nothing is made or changed."""
    yield Finding("penstock", "ok", penstock.__version__)
    yield _python()
    yield _sqlite(sqlite3.sqlite_version_info)
    for package, gain in (("uvloop", "a faster event loop"), ("watchfiles", "run --reload")):
        yield _package(package, gain)
    path = config.find_file()
    yield Finding("configuration", "ok", f"{path}" if path else f"no {config.FILE} here or above")
    file = database(url)
    if file is not None:
        async for finding in _file(file):
            yield finding
    if file is not None and not _is_there(file):
        yield _not_yet("broker", file)
    else:
        async for finding in _broker(url):
            yield finding
    async for finding in _store(store, file):
        yield finding


def _python() -> Finding:
    what = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}"
    old = sys.version_info < (3, 11)
    return Finding("python", "failed" if old else "ok", f"{what}; Penstock needs 3.11" if old else what)


def _sqlite(version: tuple[int, int, int]) -> Finding:
    text = ".".join(map(str, version))
    if version >= FIXED_SQLITE:
        return Finding("sqlite", "ok", text)
    return Finding(
        "sqlite",
        "warning",
        f"{text} has the WAL-reset fault that 3.51.3 mended; Penstock's processes keep clear of it by a lock file, "
        "so let no other program write to or checkpoint the file",
    )


def _package(name: str, gain: str) -> Finding:
    if importlib.util.find_spec(name) is not None:
        return Finding(name, "ok", "installed")
    extra = "reload" if name == "watchfiles" else name
    return Finding(name, "note", f"not installed ({gain}): pip install 'penstock[{extra}]'")


async def _file(file: str) -> AsyncIterator[Finding]:
    yield _disk(file)
    if _is_there(file):
        yield _permissions(file)
        yield await asyncio.to_thread(_integrity, file)


def _is_there(file: str) -> bool:
    return os.path.exists(file)


def _disk(file: str) -> Finding:
    folder = os.path.dirname(file)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("disk", "failed", f"{folder}: {error.strerror}")
    if not os.access(folder, os.W_OK):
        return Finding("disk", "failed", f"{folder} is not writable")
    health: Health = "failed" if free < NO_DISK else "warning" if free < LOW_DISK else "ok"
    return Finding("disk", health, f"{_size(free)} free in {folder}")


def _permissions(file: str) -> Finding:
    others = os.stat(file).st_mode & 0o077
    detail = f"{_size(os.path.getsize(file))}, mode {os.stat(file).st_mode & 0o777:o}"
    if others:
        return Finding("file", "warning", f"{detail}: other users of this machine can open it; chmod 600 {file}")
    return Finding("file", "ok", detail)


def _integrity(file: str) -> Finding:
    """Read the whole file, without a lock that would keep anybody from writing."""
    pragma = "integrity_check" if os.path.getsize(file) <= WHOLE_CHECK else "quick_check"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(file)}?mode=ro", uri=True, timeout=5)) as connection:
            rows = [str(row[0]) for row in connection.execute(f"PRAGMA {pragma}(5)")]
    except sqlite3.Error as error:
        return Finding("integrity", "failed", f"{file}: {error}")
    if rows == ["ok"]:
        return Finding("integrity", "ok", f"no damage found ({pragma})")
    return Finding("integrity", "failed", f"{file}: {'; '.join(' '.join(row.split()) for row in rows)}")


async def _broker(url: str) -> AsyncIterator[Finding]:
    try:
        async with connected(url) as broker:
            yield Finding("broker", "ok", f"{config.mask(url)} can be reached")
            yield Finding("capabilities", "ok", _capabilities(broker.capabilities))
            if not broker.capabilities.durable:
                yield Finding("durable", "note", "what it confirms may be lost with its process, or in a power cut")
            elif needed := broker.capabilities.durable_with:
                said = f"what it has just confirmed may be lost in a power cut, unless its server has {needed!r}"
                yield Finding("durable", "note", said)
    except PenstockError as error:
        yield Finding("broker", "failed", f"{config.mask(url)}: {error}")


def _capabilities(able: Capabilities) -> str:
    flags = [name for name in Capabilities.__struct_fields__ if getattr(able, name) is True]
    lease = "as long as its consumer lives" if able.max_lease is None else f"for at most {able.max_lease:g} s"
    priorities = f", {able.priorities} priorities" if able.priorities else ""
    return f"{', '.join(flags)}{priorities}; a message may be held {lease} (max_lease)"


async def _store(url: str | None, broker_file: str | None) -> AsyncIterator[Finding]:
    if url is None:
        yield Finding("store", "note", "none: tasks keep no results, and nothing can be scheduled (--store)")
        return
    file = store_file(url)
    if file is not None and file != broker_file:
        async for finding in _file(file):
            yield finding
    if file is not None and not _is_there(file):
        yield _not_yet("store", file)
        return
    try:
        async with remembered(url) as ledger:
            able = ledger.store.capabilities
            kept = "what it keeps survives a power cut" if able.durable else "what it keeps is gone with its process"
            if able.shared and not able.durable:
                kept = "it does not sync each write to its disk: a power cut may cost the last ones, or all"
            yield Finding("store", "ok" if able.shared else "note", f"{config.mask(url)} can be reached; {kept}")
    except PenstockError as error:
        yield Finding("store", "failed", f"{config.mask(url)}: {error}")


def _not_yet(what: str, file: str) -> Finding:
    return Finding(what, "note", f"{file} does not exist yet: it is made at the first use")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
