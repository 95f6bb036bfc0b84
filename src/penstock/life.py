"""`Life`: one run of an app, from start to stop."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

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
from penstock.waiting import Deadline

if TYPE_CHECKING:
    from penstock.app import App
    from penstock.workers.definition import Worker
    from penstock.workers.supervisor import Supervisor

FIRST_RETRY, LONGEST_RETRY = 0.5, 10.0  # seconds between tries to reach a broker at the start

DEAD_LETTERS = "dead letters"
"""The pool's name for the broker of `App(dead_letters=…)`."""

LATEST = 4.0
"""Seconds after the grace in which a stop has ended, whether or not broker and store answer."""
PARTING = 3.0
"""Seconds that they have to answer when messages are released, and as many when connections are closed."""
SILENT = 1.0
"""The same, of those that have just failed to."""
HURRIED = 2.0
"""Seconds in which a stop has ended whose grace is cut short."""
SPARE = 0.5  # seconds of these that are kept for the release

MOST_ABANDONED = 4
"""Runs that may be stuck where nothing can stop them, before the process drains and is started again."""

T = TypeVar("T")
_Step: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


class Life:
    """One run of an app, from start to stop."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._consumers: list[Consumer] = []
        self._executors: list[Executor] = []
        self._runners: list[Runner] = []
        self._scheduling: asyncio.Task[None] | None = None
        self._supervisor: Supervisor | None = None
        self._around: Surroundings | None = None
        self._of_tasks: dict[str, tuple[Consumer, Runner]] = {}
        self._leaving: set[Consumer] = set()
        self._abandoned = Abandoned(MOST_ABANDONED, self._wear_out)
        self._watchdog = Watchdog()
        self._watching = False
        self._started_hooks = False
        self.deadline = Deadline()
        """Of its end, once that has begun."""
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.worn_out = asyncio.Event()
        """Too much is stuck in this process: it should drain and be started again."""

    @property
    def consuming(self) -> bool:
        staying = [consumer for consumer in self._consumers if consumer not in self._leaving]
        return bool(staying or self._supervisor) and all(consumer.consuming for consumer in staying)

    @property
    def settled(self) -> int:
        """Messages that are done with, one way or another, in all queues that are consumed now."""
        return sum(consumer.settled for consumer in self._consumers)

    async def start(self) -> None:
        app = self.app
        current_app.set(app)
        app.client._in_use = True
        for route in app.routes:
            await self._broker(route.broker, route.vhost)  # before the hooks: a wrong URL costs nothing yet
        self._started_hooks = True
        for hook in app._startup:
            await _call(hook)
        dead = await self._broker(DEAD_LETTERS, None) if app._dead_letters is not None else None
        self._around = Surroundings(solitude=Solitude(), lease=app.lease, max_body=app.max_body, dead_letters=dead)
        self._watchdog.__enter__()
        self._watching = True
        for topic, handler, decode in app._listeners:
            executor = Executor(handler, 1, name_of(handler))
            self._executors.append(executor)
            await app.client._listening.add(topic, executor.call, decode)
        tasks = {id(task.route): task for task in app.tasks.values()}
        for route in app.routes:
            begin = partial(self._begin, route, tasks.get(id(route)))
            await self._until_reached("broker", begin)  # it may go away again between any two declarations
        if app.schedules:
            from penstock.tasks.schedule import Scheduler  # not everybody's: it costs some milliseconds of each start

            scheduler = Scheduler(app.schedules, (await self.ledger()).store, self._enqueue)
            self._scheduling = asyncio.create_task(scheduler.run(), name="penstock-schedules")
            self._scheduling.add_done_callback(self._scheduling_ended)
        if app.workers:
            supervisor = await self.supervise()
            for worker in app.workers.values():
                supervisor.add(worker)
        if queues := self._queues():
            app.log.info("consuming %s from %s", ", ".join(queues), config.mask(app.url))
        else:
            app.log.info("working with %s", config.mask(app.url))

    async def _begin(self, route: Route, task: TaskFunction[..., Any] | None) -> None:
        if task is not None:
            await self._employ(task)
        else:
            await self._consume(route, await self._broker(route.broker, route.vhost))

    def _queues(self) -> list[str]:
        return [name for route in self.app.routes for name in route.queues]

    async def _until_reached(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """What comes of an attempt; one that finds somebody away is made again until it does not."""
        delay = FIRST_RETRY
        while True:
            try:
                return await attempt()
            except (BrokerUnavailable, TimeoutError) as error:
                self.app.log.warning("%s not reachable, again in %.1f s: %s", what, delay, error)
            await asyncio.sleep(delay)
            delay = min(delay * 2, LONGEST_RETRY)

    async def _broker(self, name: str | None, vhost: str | None) -> Broker:
        """A connected broker; one that cannot be reached is tried until it can."""
        return await self._until_reached("broker", lambda: self.app.client._pool.get(name, vhost))

    async def broker(self) -> Broker:
        """The app's main one, connected; one that cannot be reached is tried until it can.

        :raises BrokerRefused: it will never have us.
        """
        return await self._broker(None, None)

    async def ledger(self) -> Ledger:
        """That of the app's store; one that cannot be reached is tried until it can.

        :raises StoreRequired: it has none.
        """
        return await self._until_reached("store", lambda: self.app.client._ledger(LONGEST_RETRY))

    async def take(self, task: TaskFunction[..., Any]) -> None:
        """Run a task from now on, as if the app had declared it.

        :raises DuplicateTask, DuplicateQueue: the app has one of that name.
        :raises BrokerError: its queue cannot be declared.
        """
        app = self.app
        app._adopt(task)
        try:
            if app.store is not None:
                await (await self.ledger()).topics.register(task.name, task.topics)
            await self._employ(task)
        except BaseException:
            app._disown(task)
            raise

    async def drop(self, task: TaskFunction[..., Any], grace: float) -> None:
        """Run it no more: what runs has `grace` seconds to end, what waits in its queue stays there.

        If it fails or is cancelled, call it again; else `stop` ends what is left.
        """
        consumer, runner = self._of_tasks[task.name]
        self._leaving.add(consumer)
        await consumer.stop(grace)
        await runner.close()
        del self._of_tasks[task.name]
        self._consumers.remove(consumer)
        self._leaving.discard(consumer)
        self._runners.remove(runner)
        self.app._disown(task)

    async def supervise(self, office: Callable[[Worker], str] | None = None) -> Supervisor:
        """Of the workers that are resident here; the first call makes it. `office(worker)` is what a `single` one
        needs to run: by default one of its own."""
        from penstock.workers.supervisor import Supervisor, own_office

        if self._supervisor is None:
            elects = office is not None or any(worker.mode == "single" for worker in self.app.workers.values())
            store = (await self.ledger()).store if elects else None
            grace = self.app.grace
            self._supervisor = Supervisor(store, grace, self._abandoned, self._fail, office or own_office)
        return self._supervisor

    async def _consume(self, route: Route, broker: Broker) -> Consumer:
        assert self._around is not None
        consumer = Consumer(route, broker, self._around, self._fail)
        try:
            await consumer.start()
        except BaseException:
            await consumer.close()
            raise
        self._consumers.append(consumer)
        return consumer

    async def _employ(self, task: TaskFunction[..., Any]) -> None:
        """Consume the queue of a task, with its work as the handler."""
        policy, ledger, limits = task.policy, None, None
        broker = await self._broker(task.route.broker, task.route.vhost)
        if self.app.store is not None:
            ledger = await self.ledger()
            if policy.cluster_limit is not None or policy.rate_limit is not None:
                rng = random.Random()  # noqa: S311 - jitter
                limits = Limits(task.name, ledger.store, policy.cluster_limit, policy.rate_limit, SYSTEM_CLOCK, rng)
        assert self._around is not None
        runner = self._runner(task)
        work = Work(task, runner, broker, ledger, limits, self._around)
        route = msgspec.structs.replace(task.route, handler=work.handle, announce=work.announce)
        try:
            self._of_tasks[task.name] = await self._consume(route, broker), runner
        except BaseException:
            await runner.close()
            raise
        self._runners.append(runner)

    def _runner(self, task: TaskFunction[..., Any]) -> Runner:
        function, policy = task.function, task.policy
        if policy.isolation == "process":
            return ProcessRunner(task, policy.concurrency, task.name, lambda: self.app.settings)
        if is_async(function) and policy.isolation != "thread":
            return LoopRunner(function, self._abandoned)
        return ThreadRunner(function, policy.concurrency, task.name, self._abandoned)

    async def _enqueue(self, name: str, instants: Sequence[tuple[str, float]]) -> None:
        """The tasks of some instants of a schedule."""
        task = self.app.tasks[name]
        asked = Terms(arguments=True, result_ttl=task.policy.result_ttl)
        body = task.signature.encode((), {})
        options = {"expires": task.policy.expires}
        send = self.app.client._send_task
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
        self.app.log.critical(
            "%s: too many runs are stuck where nothing can stop them (isolation='process' can be stopped for certain)",
            name,
        )
        self.worn_out.set()

    def _fail(self, error: BaseException) -> None:
        self.app.log.critical("consuming cannot go on: %s: %s", type(error).__name__, error)
        if not self.failed.done():
            self.failed.set_result(error)

    def cancel(self) -> None:
        """Cut the grace short: cancel the handler calls under way, and workers. `stop` then releases their messages."""
        self.deadline.within(HURRIED)
        if self._supervisor is not None:
            self._supervisor.cancel()
        for consumer in self._consumers:
            consumer.cancel()

    def end_within(self, grace: float) -> Deadline:
        """The grace begins now, unless it has begun; all of the stop shares what is returned."""
        self.deadline.within(grace + LATEST)
        return self.deadline

    async def stop(self, grace: float) -> None:
        """Let what runs end within the grace, settle it, release the rest and disconnect.

        Broker and store that do not answer are cut off in the end: what was not settled comes again.
        """
        app, deadline = self.app, self.end_within(grace)
        left = max(deadline.left - LATEST, 0.0)
        if self._scheduling is not None:
            self._scheduling.cancel()
            await asyncio.gather(self._scheduling, return_exceptions=True)
        ending = [self._end(partial(consumer.finish, left), consumer.close) for consumer in self._consumers]
        if self._supervisor is not None:
            ending.append(self._end(self._supervisor.finish, self._supervisor.stop))
        told = all(await asyncio.gather(*ending))
        for runner in list(self._runners):
            await runner.close()
        if self._started_hooks:
            for hook in reversed(app._shutdown):
                try:
                    async with deadline.limit():
                        await _call(hook)
                except Exception:
                    app.log.exception("shutdown hook %r failed", hook)
        for executor in self._executors:
            executor.close()
        if self._watching:
            self._watchdog.__exit__(None, None, None)
        if app._client is not None:
            app._client._in_use = False
            told = await deadline.allow(app._client.close(), most=PARTING if told else SILENT) and told
            app._client = None
        if not told:
            app.log.warning("broker or store did not answer at the end: what was not settled or released comes again")

    async def _end(self, finish: _Step, release: _Step) -> bool:
        """End what one part runs, then have it give back what it holds; whether that was done in time."""
        await self.deadline.allow(finish(), spare=SPARE)
        return await self.deadline.allow(release(), most=PARTING)


async def _call(hook: Callable[[], Any]) -> None:
    result = hook()
    if inspect.isawaitable(result):
        await result


def _in_time(taskid: str, instant: float) -> str:
    """The id of an instant's task, among those of other tasks: they begin with their time (`new_taskid`)."""
    return f"{int(instant * 1000):012x}.{taskid}"
