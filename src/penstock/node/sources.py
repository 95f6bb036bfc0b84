"""`Sources`: the directory and the store, which say what a node hosts, and what becomes of a change in either."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable

from penstock.clock import backoff_delay
from penstock.control import cluster
from penstock.control.cluster import Cluster
from penstock.errors import BrokerError, BrokerRefused, ConfigError, one_line
from penstock.node import book
from penstock.node.book import Book
from penstock.node.bound import Bound
from penstock.node.definitions import Definition, Definitions
from penstock.node.documents import InvalidDefinitions, Problem
from penstock.node.folder import Folder, all_of
from penstock.node.roster import Roster
from penstock.stores.ledger import Ledger

log = logging.getLogger("penstock.node")

LOOK_AGAIN = 30.0  # seconds after which the book is read again, though nothing was heard of it
BACKOFF = (0.5, 10.0)  # seconds while store or directory cannot be read


class Sources:
    """Has the book say what the directory says, and the roster do what the book says. For one event loop."""

    def __init__(
        self, folder: Folder, ledger: Ledger, book: Book, bound: Bound, cluster: Cluster, roster: Roster
    ) -> None:
        self.complaints: list[Problem] = []
        """What is wrong with the directory now; what it said before is in force."""
        self._folder = folder
        self._ledger = ledger
        self._book = book
        self._bound = bound
        self._cluster = cluster
        self._roster = roster
        self._taken = 0
        """The version of the directory that the book knows."""
        self._wanted: list[Definition] = []
        """What it defines."""
        self._looking = asyncio.Lock()
        self._begun = self._applied = 0
        """Looks at the store: how many have begun, and which was the last that came to its end."""
        self._told: dict[Problem, object] = {}
        """The complaints, each with what its file was when it was logged."""
        self._lost = False
        """Whether it has to say all of it again."""
        self._restored = -math.inf
        self._reading = asyncio.Lock()

    async def begin(self, wanted: Definitions) -> None:
        """Take in what was read in the directory, and apply what the store says then, again while that is away.

        :raises BrokerRefused: it will not have us.
        """
        await _again("the directory", lambda: self._take_in(wanted))
        await _again("the store", self._look)

    async def follow(self) -> None:
        """Apply each change in the store."""
        while True:
            try:
                async with self._ledger.followers.follow([book.BELL, cluster.BELL]) as bell:
                    while True:
                        await self._look()
                        await bell.wait(LOOK_AGAIN)
            except BrokerRefused:
                raise
            except BrokerError as error:
                log.warning("the definitions in the store cannot be read: %s", one_line(error))
                await asyncio.sleep(BACKOFF[0])

    async def watch(self) -> None:
        """Take in each change in the directory."""
        failures = 0
        while True:
            try:
                async for _ in self._folder.changes():
                    await _again("the directory", self._read_again)
                    failures = 0
            except ConfigError as error:
                log.warning("changes in %s are not seen: %s", self._folder.path, error)
                return
            except (OSError, RuntimeError) as error:
                log.error("%s cannot be watched: %s", self._folder.path, one_line(error))
            failures += 1
            await asyncio.sleep(backoff_delay(failures, BACKOFF, random.Random()))  # noqa: S311 - jitter

    async def _take_in(self, wanted: Definitions) -> None:
        """Have the book say what the directory says."""
        version, definitions = self._folder.version, all_of(wanted)
        taken = await self._book.take_in(definitions, self._folder.origin)
        self._taken, self._wanted, self._lost = version, definitions, False
        if taken.written or taken.removed:
            written, removed = len(taken.written), len(taken.removed)
            log.info("%d definitions read from %s, %d removed", written, self._folder.path, removed)

    async def _read_again(self) -> None:
        async with self._reading:
            wanted = await self._directory()
            if wanted is not None and (self._lost or self._folder.version != self._taken):
                await self._take_in(wanted)
            elif self._lost:
                await self._book.take_in(self._wanted, self._folder.origin)
                self._lost = False

    async def _directory(self) -> Definitions | None:
        """None: there is something wrong with it, which was logged."""
        try:
            wanted = await asyncio.to_thread(self._folder.read)
        except InvalidDefinitions as invalid:
            signatures = {problem: self._folder.signature(problem.place.file) for problem in invalid.problems}
            for problem, signature in signatures.items():
                if problem not in self._told or self._told[problem] != signature:
                    log.error("%s (what was defined before stays as it was)", problem)
            self._told, self.complaints = signatures, list(invalid.problems)
            return None
        except (ConfigError, OSError) as error:
            log.error("%s (what was defined before stays as it was)", one_line(error))
            return None
        self._told, self.complaints = {}, []
        return wanted

    async def catch_up(self) -> None:
        """Apply what the store says now, if no look that began later than this has done so.

        :raises BrokerError: the store is away.
        """
        asked = self._begun
        async with self._looking:
            if self._applied <= asked:
                await self._look_in_turn()

    async def _look(self) -> None:
        async with self._looking:  # what an older look has read must not come after what a newer one has
            await self._look_in_turn()

    async def _look_in_turn(self) -> None:
        """Apply what the store says."""
        self._begun += 1
        await self._bound.read()  # first: what is bound from now on is in the book already
        said = self._wanted
        wanted, problems = await self._book.read()
        if self._is_lost(said):
            await self._read_again()
            wanted, problems = await self._book.read()
        for problem in problems:
            log.error("a definition in the store cannot be used: %s", problem)
        self._roster.obey(await self._cluster.wanted())  # first: what is paused is not to begin
        self._roster.apply(wanted)
        self._applied = self._begun

    def _is_lost(self, said: list[Definition]) -> bool:
        """Whether the store was emptied of what had been said to it. Asked now and then, or two nodes of one name could
        undo each other's for ever."""
        now = time.monotonic()
        if now - self._restored > LOOK_AGAIN / 2 and self._book.has_lost(said, self._folder.origin):
            log.warning("the definitions are gone from the store: %s is read into it again", self._folder.path)
            self._lost, self._restored = True, now
        return self._lost


async def _again(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Do something, again while the store is away."""
    failures = 0
    while True:
        try:
            await work()
        except BrokerRefused:
            raise
        except BrokerError as error:
            failures += 1
            delay = backoff_delay(failures, BACKOFF, random.Random())  # noqa: S311 - jitter
            log.warning("%s, again in %.1f s: %s", what, delay, one_line(error))
            await asyncio.sleep(delay)
        else:
            return
