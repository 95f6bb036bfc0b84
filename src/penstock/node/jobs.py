"""A job at work: a task whose function is a script that may change while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from types import CodeType
from typing import Any

from penstock.app import App
from penstock.delivery.stopping import Runner
from penstock.errors import ConfigError, Unsupported
from penstock.node.definitions import JobDefinition
from penstock.node.mu import plain
from penstock.node.names import Names, Turn, content_of, current_turn
from penstock.node.scripts import JOB
from penstock.node.slack import api
from penstock.node.slack.bot import Bot
from penstock.node.slack.said import HEADER, Origin, answer_of, failure_of, origin_of
from penstock.tasks.definition import TaskFunction, TaskPolicy
from penstock.tasks.signature import Task

log = logging.getLogger("penstock.node")

Body = Callable[[Any], Awaitable[Any]]


class Job:
    """A job on this node. `turns` bounds the runs at once of all of them."""

    def __init__(self, definition: JobDefinition, names: Names, turns: asyncio.Semaphore) -> None:
        self.definition = definition
        self.bot: Bot | None = None
        """That writes back to Slack, of a job that listens to it."""
        self._names = names
        self._turns = turns
        self._loaded: tuple[CodeType, Body] | None = None

    async def run(self, task: Task) -> Any:
        """One task: the script, with the task at hand. What it returns is the run's result; whoever wrote the task
        in Slack is told.

        :raises Unsupported: the job runs no tasks.
        :raises TypeError: the task's content is no dict.
        """
        definition = self.definition
        if definition.injects:
            what = f"job {definition.name!r} runs what is written to it in Slack, and no task that is sent to it"
            raise Unsupported(what)
        origin = _origin_of(definition, task)
        try:
            topic = task.topic if origin is None else origin.listed
            content = content_of({} if task.content is None else task.content)
            value = await self._in_turn(self._script, self._names.job_task(task.taskid, topic, content))
        except (Exception, SystemExit) as error:
            await self._answer(origin, failure_of(error))
            raise
        await self._answer(origin, answer_of(value))
        return value

    async def inject(
        self, code: CodeType, text: str, task: Task, runner: Callable[[Body], Runner], limit: float
    ) -> Any:
        """Run code that is no task's, as if it were the script.

        :raises Overrun: it took over `limit` seconds.
        """
        function = self._names.load(self.definition.name, text, code)[JOB]
        given = self._names.job_task(task.taskid, task.topic, task.content)
        return await self._in_turn(lambda task: runner(function).run((task,), {}, limit), given)

    async def _in_turn(self, body: Body, task: Any) -> Any:
        turn = Turn(self._turns)
        await turn.take()
        current_turn.set(turn)
        try:
            return plain(await body(task))
        finally:
            turn.end()

    async def _script(self, task: Any) -> Any:
        definition = self.definition
        code, script = definition.code, definition.script
        assert code is not None
        assert script is not None
        if self._loaded is None or self._loaded[0] is not code:
            self._loaded = code, self._names.load(definition.name, script, code)[JOB]
        return await self._loaded[1](task)

    async def _answer(self, origin: Origin | None, text: str | None) -> None:
        if origin is None or text is None:
            return
        if self.bot is None:
            log.warning("job %s: %s gets no answer: it has no bot here", self.definition.name, origin.listed)
            return
        await self.bot.answer(origin, text)


def _origin_of(definition: JobDefinition, task: Task) -> Origin | None:
    """None: the task was not written in Slack, whatever it says."""
    if definition.slack is None or task.message is None or HEADER not in task.message.headers:
        return None
    with contextlib.suppress(ConfigError):
        found = origin_of(task.message.headers, definition.name, api.bot_token(definition.slack.token))
        if found is not None:
            return found
    log.warning("job %s: task %s says it is from Slack, without its bot's signature", definition.name, task.taskid)
    return None


def task_of(job: Job, app: App, concurrency: int, max_length: int) -> TaskFunction[..., Any]:
    """The task that a job is to the engine: its queue has its name, and may hold `max_length` tasks."""
    definition = job.definition
    policy = TaskPolicy(concurrency=concurrency, priorities=0)
    return TaskFunction(
        job.run, definition.name, definition.bound, policy, lambda: app.client, app, max_length=max_length
    )
