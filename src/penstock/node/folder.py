"""The directory of a node: its YAML files, read again when they change."""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import logging
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError, one_line, printable
from penstock.node.definitions import (
    SUFFIXES,
    Definition,
    Definitions,
    FunctionDefinition,
    JobDefinition,
    WorkerDefinition,
    collect,
    files_of,
    parse,
    read_confined,
)
from penstock.node.documents import InvalidDefinitions, Place, Problem
from penstock.node.scripts import parse as parse_script

log = logging.getLogger("penstock.node")

REQUIREMENTS = "requirements.txt"
SETTLED = 100  # milliseconds without a change after which files are read
LONGEST = 200  # milliseconds that files may go on changing until they are read
LOOK = 1000  # milliseconds
MOST_QUIET = 30  # of these without a change, after which files are read all the same


class Folder:
    """A directory of definitions. `read` parses only what has changed since it was called last; it blocks, as does
    `requirements`. `node`: the name of who reads it, by default the host's."""

    def __init__(self, path: Path, node: str | None = None) -> None:
        self.path = path
        self._node = node or socket.gethostname()
        self.origin = ""
        """Which directory it is, among those of all nodes; known once it was read."""
        self.version = 0
        """Grows when something else is read than last time."""
        self._read: dict[str, tuple[object, list[Definition] | InvalidDefinitions]] = {}

    def read(self) -> Definitions:
        """:raises InvalidDefinitions: everything that is wrong in it; a folder of it that cannot be read.
        :raises ConfigError: there is no such directory.
        """
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is not a directory")
        self.origin = f"{self._node}:{self.path.resolve()}"
        files = files_of(self.path)
        for gone in self._read.keys() - set(files):
            del self._read[gone]
            self.version += 1
        return collect(self._file(file) for file in files)

    def _file(self, file: str) -> list[Definition] | InvalidDefinitions:
        """What a file defines, or all that is wrong with it."""
        if file != printable(file):
            return InvalidDefinitions([Problem(Place(printable(file), 1), "its name is not UTF-8")])
        try:
            found = os.stat(self.path / file)
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError("it is not a file")  # to open a pipe would take until somebody writes into it
            signature = found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
            known = self._read.get(file)
            if known is None or known[0] != signature:
                known = self._read[file] = signature, parse(file, read_confined(self.path, file))
                self.version += 1
        except OSError as error:
            return InvalidDefinitions([Problem(Place(file, 1), f"cannot be read: {error.strerror or error}")])
        except ConfigError as error:
            return InvalidDefinitions([Problem(Place(file, 1), str(error))])
        return known[1]

    def signature(self, file: str) -> object:
        """What tells a file, as it was read last, from what it is once somebody has written it again."""
        known = self._read.get(file)
        return None if known is None else known[0]

    async def changes(self) -> AsyncIterator[None]:
        """Each time that a YAML file in it may have changed, or a folder came or went, and now and then, for a system
        may forget to tell.

        :raises ConfigError: nothing is installed that could tell.
        """
        stop = threading.Event()
        changes = self._watched(stop)  # the first time right after it has begun: something may have changed before
        try:
            while await asyncio.to_thread(next, changes, False):
                yield
        finally:
            stop.set()

    def _watched(self, stop: threading.Event) -> Iterator[bool]:
        """The same, blocking, until `stop` is set."""
        try:
            from watchfiles import Change, watch
        except ImportError:
            raise ConfigError("watching files needs watchfiles: pip install 'penstock[server]'") from None
        due = 0.0  # the next look, whatever has changed: a database that is busy here leaves no time without a change

        def tells(change: Change, path: str) -> bool:
            return time.monotonic() >= due or self._concerns(change.raw_str(), path)

        for changes in watch(
            self.path,
            watch_filter=tells,
            step=SETTLED,
            debounce=LONGEST,
            stop_event=stop,
            rust_timeout=LOOK,
            yield_on_timeout=True,
            ignore_permission_denied=True,
        ):
            told = any(self._concerns(change.raw_str(), path) for change, path in changes)
            if told or time.monotonic() >= due:
                due = time.monotonic() + LOOK / 1000 * (1 if told else MOST_QUIET)
                yield True

    def _concerns(self, change: str, path: str) -> bool:
        """Whether a change, `added`, `modified` or `deleted`, may be one of definitions."""
        if path.endswith(SUFFIXES):
            return True
        inside = os.path.relpath(path, self.path)
        # A folder that is moved comes and goes as one, without a word of its files.
        if change == "deleted":
            return any(file.startswith(inside + os.sep) for file in list(self._read))
        ignored = any(part.startswith(".") or part == "__pycache__" for part in inside.split(os.sep))
        return change == "added" and not ignored and os.path.isdir(path)

    @property
    def requirements(self) -> Path | None:
        """`requirements.txt`, if there is one."""
        path = self.path / REQUIREMENTS
        return path if path.is_file() else None

    async def install(self) -> None:
        """Install what `requirements.txt` lists into this interpreter's environment.

        :raises ConfigError: pip could not.
        """
        listed = await asyncio.to_thread(lambda: self.requirements)
        if listed is None:
            return
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-r"]
        pip = await asyncio.create_subprocess_exec(
            *command, str(listed), stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        try:
            _, said = await pip.communicate()
        finally:
            if pip.returncode is None:
                pip.terminate()
                await pip.wait()
        if pip.returncode:
            lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
            raise ConfigError(f"{REQUIREMENTS}: pip failed: {lines[-1] if lines else pip.returncode}")
        importlib.invalidate_caches()


def warm(script: str) -> None:
    """Import what a script imports, where it is installed and was not imported yet: some drivers take seconds for
    that, which the event loop has not. What fails will fail again where it belongs. It blocks."""
    for name, module in _imported(script):
        if name not in sys.modules and _is_there(name):
            try:
                importlib.import_module(module)
            except BaseException as error:  # `sys.exit` in a module would end the event loop that waits for us
                log.debug("%s cannot be imported: %s", module, one_line(error))


def missing_modules(definitions: Definitions) -> list[Problem]:
    """The modules that scripts import and nobody has installed, where they are imported first. It blocks."""
    having: list[Any] = [*definitions.workers.values(), *definitions.jobs.values(), *definitions.functions.values()]
    return sorted({problem for one in having for problem in missing_in(one)})


def missing_in(one: WorkerDefinition | JobDefinition | FunctionDefinition) -> list[Problem]:
    """The same of one definition."""
    return [
        Problem(one.place, f"{one.name} imports {what}, and {name} is not installed")
        for name, what in _imported(one.script or "")
        if not _is_there(name)
    ]


def all_of(definitions: Definitions) -> list[Definition]:
    """Every definition, whatever its kind."""
    return [
        *definitions.workers.values(),
        *definitions.jobs.values(),
        *definitions.functions.values(),
        *definitions.configs.values(),
    ]


def _imported(script: str) -> Iterable[tuple[str, str]]:
    """Top-level package and module of each import in a script."""
    for node in ast.walk(parse_script(script)):
        names: list[Any] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        yield from ((name.partition(".")[0], name) for name in names)


def _is_there(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
