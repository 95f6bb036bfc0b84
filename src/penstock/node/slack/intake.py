"""What is said to a job becomes a task of its, or runs as code: once, whenever Slack says it again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import Any

from penstock.app import App
from penstock.clock import backoff_delay
from penstock.control.audit import Audit
from penstock.delivery.stopping import Abandoned, LoopRunner, Overrun
from penstock.errors import BodyTooLarge, BrokerError, PenstockError, Unencodable, Unsupported, one_line
from penstock.life import Life
from penstock.node.jobs import Job
from penstock.node.scripts import Script, ScriptError, compile_injected
from penstock.node.slack.bot import BACKOFF, MOST_AT_HAND, Bot, NotYet
from penstock.node.slack.said import HEADER, Origin, Said, answer_of, content_of, failure_of, header_of
from penstock.stores.base import ABSENT, Delete, Put
from penstock.tasks.signature import Task
from penstock.terms import Terms

log = logging.getLogger("penstock.slack")

SENDING = 10.0  # seconds of a try to make something durable
REMEMBERED = 86_400.0  # seconds that an event is known; Slack gives up far earlier
LIMIT = 60.0  # seconds that code may run
FAREWELL = 2.0  # seconds for the last word on code that is cancelled
FILE = "<slack>"
TRYING, KEPT = b"trying", b"kept"
"""What the store says of an event."""
CLAIMED = 30.0  # seconds that a node has for making an event durable, before another one may


class Elsewhere(PenstockError):
    """Somebody else is at it."""


class Intake:
    """Of one job. For one event loop."""

    def __init__(self, life: Life, job: Job) -> None:
        self._life = life
        self._job = job
        self._at_hand: dict[str, asyncio.Task[None]] = {}
        self._waiting = 0
        self._closed = False

    async def take(self, said: Said, listed: str) -> None:
        """Returns once it is durable, however long that takes.

        :raises NotYet: too much waits, or the job listens no more. Nothing was taken.
        """
        if self._closed or self._waiting >= MOST_AT_HAND:
            why = "listens no more" if self._closed else "has too much at hand"
            raise NotYet(f"job {self._job.definition.name} {why}")
        taskid = said.taskid(self._job.definition.name)
        work = self._at_hand.get(taskid)
        if work is None:
            work = asyncio.create_task(self._keep(taskid, said, listed), name="penstock-slack intake")
            self._at_hand[taskid] = work
            work.add_done_callback(lambda _: self._at_hand.pop(taskid))
        self._waiting += 1
        try:
            await asyncio.shield(work)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """What is not durable by now is Slack's still, and code that has no turn yet is not run. Idempotent."""
        self._closed = True
        ending = list(self._at_hand.values())
        for work in ending:
            work.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    async def _keep(self, taskid: str, said: Said, listed: str) -> None:
        failures, name = 0, self._job.definition.name
        while True:
            try:
                await self._try_to_keep(taskid, said, listed)
                return
            except PenstockError as error:
                failures += 1
                delay = backoff_delay(failures, BACKOFF, random.Random())  # noqa: S311 - jitter
                level = logging.DEBUG if isinstance(error, Elsewhere) else logging.WARNING
                log.log(level, "job %s: what %s says waits, again in %.1f s: %s", name, listed, delay, one_line(error))
            await asyncio.sleep(delay)

    async def _try_to_keep(self, taskid: str, said: Said, listed: str) -> None:
        """:raises PenstockError: as it says; try again."""
        raise NotImplementedError


class Letters(Intake):
    """Each message is a task in the job's own queue. `token` is its bot's."""

    def __init__(self, life: Life, job: Job, token: str) -> None:
        super().__init__(life, job)
        self._token = token

    async def _try_to_keep(self, taskid: str, said: Said, listed: str) -> None:
        store = (await self._life.app.client._ledger(SENDING)).store
        key = f"slack/{taskid}"
        (mine,) = await store.apply([Put(key, TRYING, CLAIMED, ABSENT)])
        if mine is None:
            (entry,) = await store.get([key])
            if entry is not None and entry.value == KEPT:
                return
            raise Elsewhere("another node is about to keep it")
        try:
            await self._send(taskid, said, listed)
        except BaseException:
            with contextlib.suppress(BrokerError):
                await store.apply([Delete(key, mine)])
            raise
        with contextlib.suppress(BrokerError):  # else the task's id tells, once it has ended
            await store.apply([Put(key, KEPT, REMEMBERED)])

    async def _send(self, taskid: str, said: Said, listed: str) -> None:
        origin = Origin(listed, said.channel, said.thread)
        name, content, client = self._job.definition.name, content_of(said), self._life.app.client
        headers = {HEADER: header_of(origin, name, self._token)}
        options = {"expires": None, "headers": headers}  # somebody waits: it does not expire
        try:
            await client._send_task(name, content, Terms(), None, options, SENDING, None, taskid=taskid)
        except (BodyTooLarge, Unencodable) as error:
            if self._job.bot is not None:
                await self._job.bot.answer(origin, failure_of(error))


class Injections(Intake):
    """Each message is code, which runs here and now and never comes through a queue: to send a task takes less of a
    role than to write code."""

    def __init__(self, life: Life, job: Job, running: set[asyncio.Task[None]]) -> None:
        super().__init__(life, job)
        self._running = running

    async def _try_to_keep(self, taskid: str, said: Said, listed: str) -> None:
        app = self._life.app
        store = (await app.client._ledger(SENDING)).store
        bot = self._job.bot
        assert bot is not None
        (mine,) = await store.apply([Put(f"slack/{taskid}", KEPT, REMEMBERED, ABSENT)])
        if mine is None:  # another node has it, or had it
            return
        work = self._run(taskid, said, listed, bot, Audit(store), app)
        running = asyncio.create_task(work, name="penstock-slack injection")
        self._running.add(running)
        running.add_done_callback(self._running.discard)

    async def _run(self, taskid: str, said: Said, listed: str, bot: Bot, audit: Audit, app: App) -> None:
        origin = Origin(listed, said.channel, said.thread)
        try:
            answer = await self._outcome(taskid, said, listed, audit)
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL):
                    await bot.answer(origin, "cancelled: the node stops")
            raise
        if answer is not None:
            await bot.answer(origin, answer)

    async def _outcome(self, taskid: str, said: Said, listed: str, audit: Audit) -> str | None:
        """Run what was said; what is to be answered."""
        job, text = self._job, code_in(said.text)
        who, target = f"slack {listed} ({said.user})", f"jobs/{job.definition.name}"
        try:
            try:
                code = compile_injected(Script(text, FILE, 1))
            except ScriptError as error:
                await audit.write(who, "slack.code", target, text, str(error))
                return failure_of(error)
            await audit.write(who, "slack.code", target, text)
        except PenstockError as error:
            log.warning("job %s: what %s says is not run: %s", job.definition.name, listed, one_line(error))
            return failure_of(error)
        name = f"code from Slack for {job.definition.name}"

        def runner(function: Any) -> LoopRunner:  # called when it has its turn
            if self._closed:
                raise Unsupported("the job listens no more, or to others")
            return LoopRunner(function, self._abandoned, name)

        try:
            return answer_of(await job.inject(code, text, Task(taskid, listed, content_of(said)), runner, LIMIT))
        except Overrun:
            return f"TimeoutError: stopped: it ran for over {LIMIT:g} s"
        except Exception as error:
            return failure_of(error)

    @property
    def _abandoned(self) -> Abandoned:
        return self._life._abandoned


def code_in(text: str) -> str:
    """The code in a message: without the marks by which it is shown as code."""
    text = text.strip()
    for mark in ("```", "`"):
        if text.startswith(mark) and text.endswith(mark) and len(text) > 2 * len(mark):
            return text[len(mark) : -len(mark)].strip("\n")
    return text
