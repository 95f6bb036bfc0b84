"""`Life`: one run of an app, from start to stop."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from penstock import config
from penstock.brokers.base import Broker
from penstock.clock import SYSTEM_CLOCK
from penstock.context import current_app
from penstock.delivery.arguments import name_of
from penstock.delivery.consumer import Consumer
from penstock.delivery.execution import Executor, is_async
from penstock.delivery.route import Route
from penstock.delivery.stopping import Abandoned, LoopRunner, ProcessRunner, Runner, ThreadRunner
from penstock.delivery.surroundings import Surroundings
from penstock.delivery.suspects import Solitude
from penstock.delivery.watchdog import Watchdog
from penstock.errors import BrokerUnavailable, TimeoutError
from penstock.stores.ledger import Ledger
from penstock.tasks.definition import TaskFunction
from penstock.tasks.limits import Limits
from penstock.tasks.work import Work
from penstock.terms import Terms

if TYPE_CHECKING:
    from penstock.app import App
    from penstock.workers.supervisor import Supervisor

FIRST_RETRY, LONGEST_RETRY = 0.5, 10.0  # seconds between tries to reach a broker at the start

DEAD_LETTERS = "dead letters"
"""The pool's name for the broker of `App(dead_letters=…)`."""

MOST_ABANDONED = 4
"""Runs that may be stuck where nothing can stop them, before the process drains and is started again."""


class Life:
    """One run of an app, from start to stop."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._consumers: list[Consumer] = []
        self._executors: list[Executor] = []
        self._runners: list[Runner] = []
        self._scheduling: asyncio.Task[None] | None = None
        self._supervisor: Supervisor | None = None
        self._abandoned = Abandoned(MOST_ABANDONED, self._wear_out)
        self._watchdog = Watchdog()
        self._watching = False
        self._started_hooks = False
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.worn_out = asyncio.Event()
        """Too much is stuck in this process: it should drain and be started again."""

    @property
    def consuming(self) -> bool:
        return bool(self._consumers or self._supervisor) and all(consumer.consuming for consumer in self._consumers)

    async def start(self) -> None:
        app = self._app
        current_app.set(app)
        app.client._in_use = True
        for route in app.routes:
            await self._broker(route.broker, route.vhost)  # before the hooks: a wrong URL costs nothing yet
        self._started_hooks = True
        for hook in app._startup:
            await _call(hook)
        dead = await self._broker(DEAD_LETTERS, None) if app._dead_letters is not None else None
        around = Surroundings(solitude=Solitude(), lease=app.lease, max_body=app.max_body, dead_letters=dead)
        self._watchdog.__enter__()
        self._watching = True
        for topic, handler, decode in app._listeners:
            executor = Executor(handler, 1, name_of(handler))
            self._executors.append(executor)
            await app.client._listening.add(topic, executor.call, decode)
        remembers = app.store is not None and (app.tasks or any(one.mode == "single" for one in app.workers.values()))
        ledger = await self._ledger() if remembers else None
        tasks = {id(task.route): task for task in app.tasks.values()}
        for route in app.routes:
            broker = await self._broker(route.broker, route.vhost)
            if id(route) in tasks:
                route = self._staffed(tasks[id(route)], broker, ledger, around)
            consumer = Consumer(route, broker, around, self._fail)
            await consumer.start()
            self._consumers.append(consumer)
        if app.schedules and ledger is not None:
            from penstock.tasks.schedule import Scheduler  # not everybody's: it costs some milliseconds of each start

            scheduler = Scheduler(app.schedules, ledger.store, self._enqueue)
            self._scheduling = asyncio.create_task(scheduler.run(), name="penstock-schedules")
            self._scheduling.add_done_callback(self._scheduling_ended)
        if app.workers:
            from penstock.workers.supervisor import Supervisor

            store = None if ledger is None else ledger.store
            self._supervisor = Supervisor(store, app.grace, self._abandoned, self._fail)
            for worker in app.workers.values():
                self._supervisor.add(worker)
        app.log.info("consuming %s from %s", ", ".join(self._queues()) or "nothing", config.mask(app.url))

    def _queues(self) -> list[str]:
        return [name for route in self._app.routes for name in route.queues]

    async def _broker(self, name: str | None, vhost: str | None) -> Broker:
        """A connected broker; one that cannot be reached is tried until it can."""
        delay = FIRST_RETRY
        while True:
            try:
                return await self._app.client._pool.get(name, vhost)
            except BrokerUnavailable as error:
                self._app.log.warning("broker not reachable, again in %.1f s: %s", delay, error)
            await asyncio.sleep(delay)
            delay = min(delay * 2, LONGEST_RETRY)

    async def _ledger(self) -> Ledger:
        delay = FIRST_RETRY
        while True:
            try:
                return await self._app.client._ledger(LONGEST_RETRY)
            except (BrokerUnavailable, TimeoutError) as error:
                self._app.log.warning("store not reachable, again in %.1f s: %s", delay, error)
            await asyncio.sleep(delay)
            delay = min(delay * 2, LONGEST_RETRY)

    def _staffed(
        self, task: TaskFunction[..., Any], broker: Broker, ledger: Ledger | None, around: Surroundings
    ) -> Route:
        """The route of a task, with its work as the handler."""
        policy = task.policy
        limits = None
        if ledger is not None and (policy.cluster_limit is not None or policy.rate_limit is not None):
            rng = random.Random()  # noqa: S311 - jitter
            limits = Limits(task.name, ledger.store, policy.cluster_limit, policy.rate_limit, SYSTEM_CLOCK, rng)
        runner = self._runner(task)
        self._runners.append(runner)
        work = Work(task, runner, broker, ledger, limits, around)
        return msgspec.structs.replace(task.route, handler=work.handle, announce=work.announce)

    def _runner(self, task: TaskFunction[..., Any]) -> Runner:
        function, policy = task.function, task.policy
        if policy.isolation == "process":
            return ProcessRunner(task, policy.concurrency, task.name, lambda: self._app.settings)
        if is_async(function) and policy.isolation != "thread":
            return LoopRunner(function, self._abandoned)
        return ThreadRunner(function, policy.concurrency, task.name, self._abandoned)

    async def _enqueue(self, name: str, instants: Sequence[tuple[str, float]]) -> None:
        """The tasks of some instants of a schedule."""
        task = self._app.tasks[name]
        asked = Terms(arguments=True, result_ttl=task.policy.result_ttl)
        body = task.signature.encode((), {})
        options = {"expires": task.policy.expires}
        send = self._app.client._send_task
        sent = await asyncio.gather(
            *(
                send(name, body, asked, None, options, LONGEST_RETRY, None, taskid=_in_time(taskid, instant))
                for taskid, instant in instants
            ),
            return_exceptions=True,
        )
        for outcome in sent:
            if isinstance(outcome, TimeoutError):
                raise BrokerUnavailable(str(outcome)) from outcome
            if isinstance(outcome, BaseException):
                raise outcome

    def _scheduling_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _wear_out(self, name: str) -> None:
        self._app.log.critical(
            "%s: too many runs are stuck where nothing can stop them (isolation='process' can be stopped for certain)",
            name,
        )
        self.worn_out.set()

    def _fail(self, error: BaseException) -> None:
        self._app.log.critical("consuming cannot go on: %s: %s", type(error).__name__, error)
        if not self.failed.done():
            self.failed.set_result(error)

    def cancel(self) -> None:
        """Cut the grace short: cancel the handler calls under way, and workers. `stop` then releases their messages."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        for consumer in self._consumers:
            consumer.cancel()

    async def stop(self, grace: float) -> None:
        app = self._app
        if self._scheduling is not None:
            self._scheduling.cancel()
            await asyncio.gather(self._scheduling, return_exceptions=True)
        ending = [consumer.stop(grace) for consumer in self._consumers]
        if self._supervisor is not None:
            ending.append(self._supervisor.stop())
        await asyncio.gather(*ending)
        for runner in self._runners:
            await runner.close()
        if self._started_hooks:
            for hook in reversed(app._shutdown):
                try:
                    await _call(hook)
                except Exception:
                    app.log.exception("shutdown hook %r failed", hook)
        for executor in self._executors:
            executor.close()
        if self._watching:
            self._watchdog.__exit__(None, None, None)
        if app._client is not None:
            app._client._in_use = False
            await app._client.close()
            app._client = None


async def _call(hook: Callable[[], Any]) -> None:
    result = hook()
    if inspect.isawaitable(result):
        await result


def _in_time(taskid: str, instant: float) -> str:
    """The id of an instant's task, among those of other tasks: they begin with their time (`new_taskid`)."""
    return f"{int(instant * 1000):012x}.{taskid}"
