"""`Node`: a process that hosts what a directory, and the cluster that it belongs to, define."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

import penstock
from penstock import config
from penstock.app import App
from penstock.brokers.base import Broker
from penstock.client.publishing import check_text
from penstock.clock import is_seconds
from penstock.control import cluster
from penstock.control.cluster import Cluster, Presence
from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable, ConfigError, StoreRequired, one_line
from penstock.life import Life
from penstock.node import configs
from penstock.node.book import Book
from penstock.node.bound import Bound
from penstock.node.callout import Callout
from penstock.node.console import Console
from penstock.node.debug import DebugChannel
from penstock.node.definitions import RESERVED, Definitions
from penstock.node.documents import Problem
from penstock.node.folder import Folder
from penstock.node.names import EXPIRE, Names, Verbs, content_of
from penstock.node.roster import JobLimits, Roster
from penstock.node.sources import Sources
from penstock.stores.base import Store
from penstock.stores.ledger import Ledger
from penstock.workers.definition import WATCH_INTERVAL, Worker
from penstock.workers.supervisor import Supervisor

log = logging.getLogger("penstock.node")

T = TypeVar("T")

MASTER = "master"
"""The office that a node holds which runs the `single` workers."""
LEFT = 1.5  # seconds for the app's own end, when the node's takes long
TICK = 1.0  # seconds between looks at what to tell of this node
TOLD_AGAIN = 5.0  # seconds after which it is told again, though nothing has changed
CATCHING_UP = 5.0  # seconds that a change of definitions is waited for
EVENTS_AGAIN = 10.0  # seconds between looks for events of transactions that were not issued
STEP = 1.0  # seconds between the turns that `lag` is measured by


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a node works."""

    name: str | None = None
    """Of this node among the others; None: the host's."""
    worker_watch_interval: float = WATCH_INTERVAL
    """Seconds between the end of a worker's run and the next one, unless it says otherwise."""
    job_queue_size: int = 65_535
    """Tasks that may wait for each job; beyond it `QueueFull`."""
    job_queue_bulk_read_size: int = 32
    """Tasks that are read at once, and run at once."""
    console: bool = False
    """Whoever may edit definitions may run code in it."""
    job_transaction_event: bool = False
    """Each step of a transaction's life is a task on `Transaction.<Status>`."""

    def __post_init__(self) -> None:
        """:raises ConfigError: a value that cannot be."""
        if not is_seconds(self.worker_watch_interval):
            raise ConfigError(f"worker_watch_interval must be seconds, 0 or more, not {self.worker_watch_interval!r}")
        for what in ("job_queue_size", "job_queue_bulk_read_size"):
            if getattr(self, what) < 1:
                raise ConfigError(f"{what} must be a whole number above 0, not {getattr(self, what)!r}")
        if self.name is not None:
            try:
                check_text("a node's name", self.name)
            except ValueError as error:
                raise ConfigError(str(error)) from None


class Node:
    """Hosts the definitions of a directory, with all other nodes that share its store. `async with` it.

    The directory is read, and checked, before anything starts. While the node runs its files are watched, and
    the store that the nodes share is followed: what changes there is applied, and nothing else disturbed.

    :raises StoreRequired: the app has no store.
    """

    def __init__(self, folder: Path, app: App, options: NodeOptions | None = None) -> None:
        if app.store is None:
            raise StoreRequired("a node")
        self.id = uuid.uuid4().hex[:12]
        self.app = app
        self.options = options or NodeOptions()
        self.name = self.options.name or socket.gethostname()
        self.folder = Folder(folder, self.name)
        if self.options.job_transaction_event:
            app.transactions.events = True
        self.started_at = 0.0
        self.url: str | None = None
        """Of its HTTP, once that is served."""
        self.own_url: str | None = None
        """Where `callout` in its scripts reaches it."""
        self.token: str | None = None
        """That `callout` shows there."""
        self._ledger: Ledger | None = None
        self._book: Book | None = None
        self._cluster: Cluster | None = None
        self._supervisor: Supervisor | None = None
        self._roster: Roster | None = None
        self._sources: Sources | None = None
        self._debug: DebugChannel | None = None
        self._console: Console | None = None
        self._names: Names | None = None
        self._callout: Callout | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._seen_at = 0.0
        """When the store last took what this node says of itself; monotonic."""
        self._turned = 0.0
        self._turning: asyncio.TimerHandle | None = None

    # -- life cycle

    @property
    def grace(self) -> float:
        """Seconds that what runs gets at the stop."""
        return self.app.grace

    @property
    def _life(self) -> Life | None:
        return self.app._life

    async def __aenter__(self) -> Self:
        """:raises InvalidDefinitions: everything that is wrong with the directory; nothing was started.
        :raises ConfigError: there is no such directory.
        :raises BrokerRefused: broker or store will not have us.
        """
        wanted = await asyncio.to_thread(self.folder.read)
        await self.app.__aenter__()
        try:
            await self._start(wanted)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()
        try:
            await self.app.__aexit__(kind, error, trace)
        finally:  # what ran until now may have used them
            if self._debug is not None:
                await self._debug.close()
            if self._callout is not None:
                await self._callout.close()

    async def _start(self, wanted: Definitions) -> None:
        life = self.app._life
        assert life is not None
        self.started_at = time.time()
        await life.broker()  # which may have no job yet that would find out that it will not have us
        self._ledger = await life.ledger()
        self._book, self._cluster, bound = Book(self.store), Cluster(self.store), Bound(self.store)
        self._debug = DebugChannel(self.app, self.name)
        self._callout = Callout(self)
        client = self.app.client
        self._names = names = Names(
            Verbs(
                send=self.send,
                waitfor=self.app.waitfor,
                callout=self._callout.call,
                publish=client.publish,
                broadcast=client.broadcast,
                call=client.call,
                qprint=self._debug.qprint,
            )
        )
        supervisor = await life.supervise(office)
        supervisor.stand(MASTER)
        self._supervisor = supervisor
        limits = JobLimits(self.options.job_queue_size, self.options.job_queue_bulk_read_size)
        self._roster = Roster(life, supervisor, names, self.cluster, bound, limits, self.options.worker_watch_interval)
        self._sources = Sources(self.folder, self.ledger, self.book, bound, self.cluster, self._roster)
        self._turn()
        await self._sources.begin(wanted)
        await self._roster.settled()
        self._tasks = [
            self._spawn(self._sources.follow(), "penstock-node definitions"),
            self._spawn(self._sources.watch(), "penstock-node files"),
            self._spawn(self._tell(), "penstock-node presence"),
        ]
        if self.options.job_transaction_event:
            self._tasks.append(self._spawn(self._tell_events(), "penstock-node events"))
        there = f"{len(self._roster.workers)} workers and {len(self._roster.jobs)} jobs"
        log.info("node %s hosts %s of %s", self.name, there, self.folder.path)
        if self.options.console:
            self._console = Console(names, self.name, client.subscribe)
            log.warning("the console is on: whoever may edit definitions may run code in this node")

    async def _stop(self) -> None:
        if self._life is not None:
            await self._life.end_within(self.grace).allow(self._leave(), spare=LEFT)
        for task in self._tasks:  # there are none, if there was time to leave
            task.cancel()
        if self._turning is not None:
            self._turning.cancel()
        self._ledger = self._book = self._cluster = None

    async def _leave(self) -> None:
        """Bring about nothing more, and be known to have gone."""
        if self._console is not None:
            await self._console.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._roster is not None:
            await self._roster.end()
        if self._seen_at:
            with contextlib.suppress(BrokerError, TimeoutError):
                async with asyncio.timeout(TICK):
                    await self.cluster.vanish(self.id)

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)

        def over(ended: asyncio.Task[None]) -> None:
            if not ended.cancelled() and (error := ended.exception()) is not None and self._life is not None:
                self._life._fail(error)

        task.add_done_callback(over)
        return task

    # -- what others ask of it

    @property
    def store(self) -> Store:
        """:raises BrokerUnavailable: as `ledger`."""
        return self.ledger.store

    @property
    def ledger(self) -> Ledger:
        """:raises BrokerUnavailable: the node has not started yet."""
        return _there(self._ledger)

    @property
    def book(self) -> Book:
        """The definitions of the cluster.

        :raises BrokerUnavailable: the node has not started yet.
        """
        return _there(self._book)

    @property
    def console(self) -> Console | None:
        """None: it is off.

        :raises BrokerUnavailable: the node has not started yet.
        """
        return _there(self._console) if self.options.console else None

    @property
    def secrets(self) -> set[str]:
        """What configurations hold that nobody is shown."""
        if self._names is None:
            return set()
        return {secret for one in self._names.configs.values() for secret in configs.secrets(one.values)}

    @property
    def cluster(self) -> Cluster:
        """The nodes that share the store.

        :raises BrokerUnavailable: the node has not started yet.
        """
        return _there(self._cluster)

    async def broker(self) -> Broker:
        """The main one, connected.

        :raises BrokerUnavailable, BrokerRefused: as they say.
        """
        return await self.app.client._get_broker()

    @property
    def ready(self) -> bool:
        """Connected and consuming: broker and store."""
        told = time.monotonic() - self._seen_at < cluster.PRESENT if self._seen_at else False
        return told and self._consuming

    @property
    def _consuming(self) -> bool:
        return self.app.consuming and self._roster is not None and not self._roster.cut_off

    @property
    def lag(self) -> float:
        """Seconds by which the event loop is late."""
        return max(time.monotonic() - self._turned - STEP, 0.0) if self._turned else 0.0

    @property
    def complaints(self) -> list[Problem]:
        """What is wrong with the directory now; what it said before is in force."""
        return [] if self._sources is None else self._sources.complaints

    async def send(self, topic: str, content: Any, expire: float | None = EXPIRE) -> str:
        """Issue a task; its id, once it is durable.

        :param content: a dict.
        :param expire: seconds within which it must be taken; None: whenever.
        :raises TypeError: content that is no dict.
        :raises ValueError: seconds that cannot be; a topic that is a queue beside another one.
        :raises QueueFull: too many are waiting.
        """
        if topic.endswith(RESERVED):
            raise ValueError(f"{topic!r} is no topic: dead letters and suspects come there by themselves")
        return await self.app.client.send(topic, content_of(content), expires=expire)

    async def caught_up(self) -> None:
        """Until this node hosts what the book says now, or has failed to; for a few seconds at most."""
        if self._sources is None or self._roster is None:
            return
        with contextlib.suppress(BrokerError, TimeoutError):  # it goes on by itself
            async with asyncio.timeout(CATCHING_UP):
                await self._sources.catch_up()
                await self._roster.settled()

    # -- events of transactions

    async def _tell_events(self) -> None:
        """Issue the events of transactions that whoever should have did not."""
        while True:
            try:
                await self.app.transactions.tell_left()
            except BrokerRefused:
                raise
            except (BrokerError, TimeoutError) as error:
                log.warning("events of transactions wait to be issued: %s", one_line(error))
            await asyncio.sleep(EVENTS_AGAIN)

    # -- being there

    async def _tell(self) -> None:
        """Have the other nodes, and operators, know how this one stands."""
        told: Any = None
        at = 0.0
        while True:
            standing = self._standing()
            if standing != told or time.monotonic() - at > TOLD_AGAIN:
                asked = time.monotonic()
                try:
                    if standing != told or not await self.cluster.stay(self.id):
                        await self.cluster.appear(self.id, self._presence())
                except BrokerRefused:
                    raise
                except BrokerError as error:
                    log.warning("the store does not know of this node: %s", one_line(error))
                else:
                    told, at, self._seen_at = standing, asked, asked
            await asyncio.sleep(TICK)

    def _standing(self) -> Any:
        """Something else when there is something new to tell."""
        assert self._supervisor is not None
        assert self._roster is not None
        return self._supervisor.changes, self._roster.jobs, self._epoch, self._consuming, self.url

    @property
    def _epoch(self) -> int | None:
        """Of the master's office, if it is held here."""
        term = None if self._supervisor is None else self._supervisor.term(MASTER)
        return term.epoch if term is not None and term.held else None

    def _presence(self) -> Presence:
        assert self._roster is not None
        return Presence(
            name=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=penstock.__version__,
            started_at=self.started_at,
            url=None if self.url is None else config.mask(self.url),
            epoch=self._epoch,
            ready=self._consuming,
            workers=self._roster.workers,
            jobs=self._roster.jobs,
        )

    def _turn(self) -> None:
        self._turned = time.monotonic()
        self._turning = asyncio.get_running_loop().call_later(STEP, self._turn)


def office(worker: Worker) -> str:
    """All `single` workers of a cluster run on its master."""
    return MASTER


def _there(part: T | None) -> T:
    if part is None:
        raise BrokerUnavailable("the node has not started yet, or is about to end")
    return part
