"""The roster: brings the workers and jobs of a node to where their definitions want them, while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from types import CodeType
from typing import Any

import msgspec

from penstock.clock import backoff_delay
from penstock.control.cluster import Cluster, Reported, Wanted, lines_of_each, reported
from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable, Unsupported, one_line
from penstock.life import Life
from penstock.node.bound import Bound
from penstock.node.definitions import Definitions, FunctionDefinition, JobDefinition, WorkerDefinition
from penstock.node.folder import missing_in, warm
from penstock.node.jobs import Job, task_of
from penstock.node.names import Names
from penstock.node.slack.switchboard import Switchboard
from penstock.tasks.definition import TaskFunction
from penstock.waiting import Bell
from penstock.workers.definition import Worker
from penstock.workers.supervisor import Supervisor

log = logging.getLogger("penstock.node")

BACKOFF = (0.5, 30.0)  # seconds between tries of a step that failed
SETTLING = 30.0  # seconds
JOBS_FIRST = 10.0  # seconds that workers wait for jobs at the start


class JobLimits(msgspec.Struct, frozen=True):
    """Of the jobs of a node."""

    queue_size: int = 65_535
    """Tasks that may wait for each job."""
    bulk_read_size: int = 32
    """Tasks that are read at once for each job, and that run at once of all jobs."""


class Roster:
    """The workers and jobs of a node. What is wanted of one is brought about by steps of its own: one that takes
    long to end holds up no other. For one event loop."""

    def __init__(
        self,
        life: Life,
        supervisor: Supervisor,
        names: Names,
        cluster: Cluster,
        bound: Bound,
        limits: JobLimits,
        interval: float,
    ) -> None:
        self._life = life
        self._supervisor = supervisor
        self._names = names
        self._cluster = cluster
        self._bound = bound
        self._limits = limits
        self._interval = interval
        self._turns = asyncio.Semaphore(limits.bulk_read_size)
        self._slack = Switchboard(life)
        self._wanted = Definitions()
        self._orders: dict[str, Wanted] = {}
        self._workers: dict[str, WorkerDefinition] = {}
        """Those that run."""
        self._obeyed: dict[str, Wanted] = {}
        self._jobs: dict[str, tuple[Job, TaskFunction[..., Any]]] = {}
        """Those that run."""
        self._stepping: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._anew: dict[tuple[str, str], Bell] = {}
        """Of each that is stepping: rung when something else may be wanted of it."""
        self._trying: set[tuple[str, str]] = set()
        """Those of them that have not failed yet."""
        self._cut_off: set[tuple[str, str]] = set()
        """Those that broker or store kept from being as they are wanted."""
        self._leaving: set[str] = set()
        """Workers that are about to end."""
        self._unwanted: set[str] = set()
        """Workers that have ended, of which operators want nothing any more."""
        self._tried = Bell()
        self._jobs_were_first = False
        self._ended = False

    # -- what is wanted

    def apply(self, wanted: Definitions) -> None:
        """Have exactly these workers, jobs, functions and configurations from now on."""
        before, self._wanted = self._wanted, wanted
        self._names.define(wanted.functions, wanted.configs)
        self._slack.want(wanted.jobs.values())
        for name, function in wanted.functions.items():
            if function is not before.functions.get(name):
                self._step("function", name, self._warm_function)
        for name in {*before.workers, *wanted.workers, *self._workers}:
            if _text(self._workers.get(name)) != _text(wanted.workers.get(name)):
                self._step("worker", name, self._bring_worker)
        for name in {*before.jobs, *wanted.jobs, *self._jobs}:
            if name not in self._jobs or _text(self._jobs[name][0].definition) != _text(wanted.jobs.get(name)):
                self._step("job", name, self._bring_job)
        for name in self._bound.jobs:  # of which others knew that they had to be unbound, and did not come to it
            if name not in self._jobs and self._stale(name):
                self._step("job", name, self._bring_job)

    def obey(self, orders: Mapping[str, Wanted]) -> None:
        """What operators want of workers."""
        self._orders = dict(orders)
        for name in self._workers.keys() - self._leaving:
            self._obey(name)

    async def settled(self) -> None:
        """Until everything is as it is wanted, or has failed once; for so long that only an import takes longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLING):
                while self._trying:
                    await self._tried.wait()

    async def end(self) -> None:
        """Bring about nothing more, and hear nothing more from Slack. What runs is for the app's life to end.
        Idempotent."""
        self._ended = True
        stepping = list(self._stepping.values())
        for step in stepping:
            step.cancel()
        await asyncio.gather(*stepping, return_exceptions=True)
        await self._slack.close(self._life.app.grace)

    # -- what is there

    @property
    def cut_off(self) -> bool:
        """Something is not as it is wanted because broker or store cannot be used."""
        return bool(self._cut_off)

    @property
    def jobs(self) -> list[str]:
        """Those that run here."""
        return sorted(self._jobs)

    @property
    def workers(self) -> list[Reported]:
        """How each worker stands here."""
        found = []
        lines = lines_of_each(len(self._workers))
        for status in self._supervisor.statuses:
            definition = self._workers.get(status.name)
            if definition is not None:
                interval, place = self._interval_of(definition), definition.place
                found.append(reported(status, interval, place.file, place.line, lines))
        return found

    def _interval_of(self, definition: WorkerDefinition) -> float:
        return self._interval if definition.watch_interval is None else definition.watch_interval

    # -- steps

    def _step(self, kind: str, name: str, bring: Callable[[str], Awaitable[bool]]) -> None:
        """Have one brought to where it is wanted, unless that is under way: then it looks again by itself."""
        if self._ended:
            return
        under_way = self._stepping.get((kind, name))
        if under_way is not None and not under_way.done():
            self._anew[kind, name].ring()
            return
        self._anew[kind, name] = Bell()
        step = asyncio.create_task(self._bring(kind, name, bring), name=f"penstock-roster {kind} {name}")
        self._stepping[kind, name] = step
        self._trying.add((kind, name))
        step.add_done_callback(lambda ended: self._over(kind, name, ended))

    def _over(self, kind: str, name: str, step: asyncio.Task[None]) -> None:
        if self._stepping.get((kind, name)) is step:
            del self._stepping[kind, name], self._anew[kind, name]
            self._cut_off.discard((kind, name))
            self._was_tried(kind, name)

    def _was_tried(self, kind: str, name: str) -> None:
        self._trying.discard((kind, name))
        self._tried.ring()

    async def _bring(self, kind: str, name: str, bring: Callable[[str], Awaitable[bool]]) -> None:
        failures = 0
        while True:
            try:
                if await bring(name):
                    return
                failures = 0
                self._cut_off.discard((kind, name))
            except Exception as error:
                failures += 1
                if isinstance(error, BrokerUnavailable | BrokerRefused):
                    self._cut_off.add((kind, name))
                delay = backoff_delay(failures, BACKOFF, random.Random())  # noqa: S311 - jitter
                log.error("%s %s is not as it is wanted, again in %.1f s: %s", kind, name, delay, one_line(error))
                self._was_tried(kind, name)
                if await self._anew[kind, name].wait(delay):
                    failures = 0  # something else is wanted now

    async def _bring_worker(self, name: str) -> bool:
        """One step; whether it is where it is wanted."""
        wanted, running = self._wanted.workers.get(name), self._workers.get(name)
        if _text(wanted) == _text(running):
            if wanted is None and name in self._unwanted and ("workers", name) not in self._wanted.not_understood:
                await self._cluster.forget([name])
            self._unwanted.discard(name)
            return True
        if running is not None:
            self._leaving.add(name)
            try:
                await self._supervisor.remove(name)
                del self._workers[name]
            finally:
                self._leaving.discard(name)
            self._obeyed.pop(name, None)
            log.info("worker %s has ended", name)
            if wanted is None:
                self._unwanted.add(name)
            return False
        assert wanted is not None
        await asyncio.to_thread(_prepare, wanted)
        await self._jobs_first()
        if self._wanted.workers.get(name) is not wanted:
            return False
        self._supervisor.add(
            Worker(
                name=name,
                function=_function(wanted, self._names),
                mode=wanted.mode,
                watch_interval=self._interval_of(wanted),
                category=wanted.category,
            )
        )
        self._workers[name] = wanted
        self._obeyed[name] = Wanted(restarts=self._orders.get(name, Wanted()).restarts)
        self._obey(name)
        return False

    async def _jobs_first(self) -> None:
        """At the start of a node: what a worker sends at once shall find the jobs that it is for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if self._jobs_were_first else JOBS_FIRST):
                while not self._jobs_were_first and any(kind == "job" for kind, _ in self._trying):
                    await self._tried.wait()
        self._jobs_were_first = True

    def _obey(self, name: str) -> None:
        order, obeyed = self._orders.get(name, Wanted()), self._obeyed[name]
        if order == obeyed:
            return
        resident = self._supervisor.find(name)
        if order.paused != obeyed.paused:
            (resident.pause if order.paused else resident.resume)()
        if order.restarts != obeyed.restarts:
            resident.restart()
        self._obeyed[name] = order

    async def _warm_function(self, name: str) -> bool:
        function = self._wanted.functions.get(name)
        if function is not None:
            await asyncio.to_thread(_prepare, function)
        return True

    async def _bring_job(self, name: str) -> bool:
        """One step; whether it is where it is wanted."""
        wanted, running = self._wanted.jobs.get(name), self._jobs.get(name)
        if running is None:
            await self._unbind(name)
            if wanted is None or not await self._slack.usable(wanted):
                return True
            await asyncio.to_thread(_prepare, wanted)
            job = Job(wanted, self._names, self._turns)
            task = task_of(job, self._life.app, self._limits.bulk_read_size, self._limits.queue_size)
            await self._bound.add(name, _topics(wanted))
            await self._life.take(task)
            self._jobs[name] = job, task
            return False
        job, task = running
        if _text(wanted) == _text(job.definition):
            await self._slack.bring(job)
            return True
        if wanted is not None and wanted.bound == job.definition.bound:
            await asyncio.to_thread(_prepare, wanted)
            job.definition = wanted
            return False
        await self._slack.leave(name)
        await self._unbind(name)
        await self._life.drop(task, self._life.app.grace)
        del self._jobs[name]
        log.info("job %s has ended", name)
        return False

    def _stale(self, name: str) -> list[str]:
        """The topics that a job is bound to, and should not be."""
        wanted = self._wanted.jobs.get(name)
        if ("jobs", name) in self._wanted.not_understood:
            return []  # others know which ones it needs
        return sorted(self._bound.of(name) - (set() if wanted is None else _topics(wanted)))

    async def _unbind(self, name: str) -> None:
        """A job gets no more tasks from topics that are not its own any more; what waits for it stays.

        :raises BrokerUnavailable: call again later.
        """
        topics = self._stale(name)
        if not topics:
            return
        await (await self._life.ledger()).topics.unregister(name, topics)
        broker = await self._life.app.client._get_broker()
        try:
            if broker.admin is None:
                raise Unsupported("this message system has no operator's side")
            await broker.admin.unbind(name, topics)
        except Unsupported as error:
            log.warning("job %s still gets what is sent to %s: %s", name, ", ".join(topics), error)
        except BrokerError as error:
            if not _has_gone(error):
                raise
        await self._bound.remove(name, topics)


def _prepare(definition: WorkerDefinition | JobDefinition | FunctionDefinition) -> None:
    """Import what a script imports, and say what of that is not there. It blocks."""
    for problem in missing_in(definition):
        log.warning("%s (pip installs it, or --install what requirements.txt lists)", problem)
    warm(definition.script or "")


def _has_gone(error: BrokerError) -> bool:
    """Whether there is no such queue any more."""
    return type(error) is BrokerError


def _topics(definition: JobDefinition) -> set[str]:
    """Those that its queue is bound to, beside its own name."""
    return set(definition.bound) - {definition.name}


def _text(definition: WorkerDefinition | JobDefinition | None) -> str | None:
    return None if definition is None else definition.text


def _function(definition: WorkerDefinition, names: Names) -> Callable[[], Any]:
    """A worker's function, which is loaded when it is first run: then what is wrong with it is its own failure."""
    loaded: list[Callable[[], Any]] = []

    def load() -> Callable[[], Any]:
        if not loaded:
            loaded.append(names.load(definition.name, definition.script, definition.code)[definition.function])
        return loaded[0]

    if _is_coroutine(definition.code, definition.function):

        async def run() -> None:
            await load()()

        return run

    def run_in_thread() -> None:
        if inspect.isawaitable(coroutine := load()()):
            if inspect.iscoroutine(coroutine):
                coroutine.close()
            raise TypeError(f"{definition.function} gives something to await: write `async def {definition.function}`")

    return run_in_thread


def _is_coroutine(module: CodeType, function: str) -> bool:
    """Whether a module's function is one, before it is run; of several of the name the last one counts."""
    made = [one for one in module.co_consts if isinstance(one, CodeType) and one.co_name == function]
    return bool(made) and bool(made[-1].co_flags & inspect.CO_COROUTINE)
