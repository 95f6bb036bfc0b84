"""What scripts see: the names that are there without an import."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import CodeType
from typing import Any

import msgspec

from penstock.context import context as app_context
from penstock.errors import ConfigError, ExpirationError, QueueFull, Unroutable, among, one_line
from penstock.node import configs
from penstock.node.definitions import ConfigDefinition, FunctionDefinition
from penstock.node.mu import MU, mu, plain
from penstock.stores.records import TaskRecord
from penstock.tasks.transaction import transaction
from penstock.workers.runtime import Runtime

EXPIRE = 10.0
"""Seconds within which a task must be taken, unless its sender says otherwise."""


ERRORS = {error.__name__: error for error in (ConfigError, ExpirationError, QueueFull, Unroutable)}
"""What the names below raise, for `except`; `TimeoutError` is Python's own."""


class Verbs(msgspec.Struct, frozen=True):
    """What scripts can have their node do."""

    send: Callable[[str, Any, float | None], Awaitable[str]]
    waitfor: Callable[[str, float | None], Awaitable[TaskRecord]]
    callout: Callable[..., Awaitable[Any]]
    publish: Callable[..., Awaitable[str]]
    broadcast: Callable[..., Awaitable[None]]
    call: Callable[..., Awaitable[Any]]
    qprint: Callable[..., None]


class Turn:
    """The turn of a job that runs, one of as many as a node has. Whoever waits for other jobs gives it back meanwhile,
    or all turns could be held by jobs that wait for those which have none."""

    def __init__(self, turns: asyncio.Semaphore) -> None:
        self._turns = turns
        self._held = self._over = False
        self._waiting = 0

    async def take(self) -> None:
        await self._turns.acquire()
        self._held = True
        if self._over:  # what the job has begun, and not ended, waits without it
            self._give_back()

    def end(self) -> None:
        """The job has ended."""
        self._over = True
        self._give_back()

    def _give_back(self) -> None:
        if self._held:
            self._held = False
            self._turns.release()

    @asynccontextmanager
    async def given_back(self) -> AsyncIterator[None]:
        """For the time of the block; of several at once, until the last one ends."""
        self._waiting += 1
        self._give_back()
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting and not self._over:
                await self.take()


current_turn: ContextVar[Turn] = ContextVar("penstock_job_turn")


class JobTask(MU):
    """`task` in a job's script: the task at hand, which issues others when it is called."""

    def __init__(self, values: Mapping[str, Any], send: Callable[..., Awaitable[str]]) -> None:
        object.__setattr__(self, "_send", send)
        super().__init__(values)

    async def __call__(self, topic: str, content: dict[str, Any], expire: float | None = EXPIRE) -> str:
        """As `send`."""
        sent: str = await object.__getattribute__(self, "_send")(topic, content, expire)
        return sent


class Functions:
    """`context` in scripts: the functions of the node as attributes, and what `penstock.context` has."""

    def __init__(self, names: Names) -> None:
        object.__setattr__(self, "_names", names)

    def __getattr__(self, name: str) -> Any:
        names: Names = object.__getattribute__(self, "_names")
        if name in names.functions:
            return names.function(name)
        if hasattr(type(app_context), name):
            return getattr(app_context, name)
        raise AttributeError(f"context has no function {name!r}{among(name, names.functions)}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"context.{name} is not to be set: a function is defined in YAML")

    def __dir__(self) -> list[str]:
        return sorted({*object.__getattribute__(self, "_names").functions, *dir(app_context)})


class Names:
    """The names that the scripts of a node see. Functions and configurations may change while it runs."""

    def __init__(self, verbs: Verbs) -> None:
        self.functions: Mapping[str, FunctionDefinition] = {}
        self.configs: Mapping[str, ConfigDefinition] = {}
        self._verbs = verbs
        self._loaded: dict[str, tuple[CodeType, Any]] = {}
        self._context = Functions(self)

    def given(self, name: str, script: str) -> dict[str, Any]:
        """New globals for a script."""
        names: dict[str, Any] = {
            "__name__": f"penstock.script.{name}",
            **ERRORS,
            "MU": MU,
            "Runtime": Runtime,
            "asyncio": asyncio,
            "broadcast": self._verbs.broadcast,
            "call": self._verbs.call,
            "callout": self._verbs.callout,
            "context": self._context,
            "get_service_config": self.get_service_config,
            "json": json,
            "logger": logging.getLogger(f"penstock.script.{name}"),
            "publish": self._verbs.publish,
            "qprint": self._verbs.qprint,
            "send": self.send,
            "task": self.send,
            "transaction": transaction,
            "waitfor": self.waitfor,
        }
        if "aiohttp" in script:  # it takes its time, and not everybody has it
            try:
                import aiohttp
            except ImportError:
                pass  # whoever uses it is told
            else:
                names["aiohttp"] = aiohttp
        return names

    def load(self, name: str, script: str, code: CodeType) -> dict[str, Any]:
        """Run the module that a script is; its globals.

        Whatever the script raises comes through.
        """
        names = self.given(name, script)
        exec(code, names)  # noqa: S102 - the definition's own code is what a node is for
        return names

    def define(self, functions: Mapping[str, FunctionDefinition], configs: Mapping[str, ConfigDefinition]) -> None:
        """Have these from now on, and no others."""
        self.functions, self.configs = dict(functions), dict(configs)
        for name in self._loaded.keys() - functions.keys():
            del self._loaded[name]

    def function(self, name: str) -> Any:
        """A function of the node.

        :raises ConfigError: its code fails before it has defined it.
        """
        definition = self.functions[name]
        known = self._loaded.get(name)
        if known is None or known[0] is not definition.code:
            try:
                loaded = self.load(name, definition.script, definition.code)[name]
            except Exception as error:
                raise ConfigError(f"{definition.place}: function {name!r}: {one_line(error)}") from error
            known = self._loaded[name] = definition.code, loaded
        return known[1]

    async def get_service_config(self, name: str, mu_conversion: bool = False) -> Any:
        """A configuration, `${ENV}` replaced: a dict, or an `MU`.

        :raises ConfigError: there is none of that name, or a variable is not set.
        """
        if name not in self.configs:
            raise ConfigError(f"no configuration is named {name!r}{among(name, self.configs)}")
        definition = self.configs[name]
        try:
            values = configs.expand(definition.values)
        except ConfigError as error:
            raise ConfigError(f"{definition.place.file}: {error}") from None
        return mu(values) if mu_conversion else values

    async def send(self, topic: str, content: Any = None, expire: float | None = EXPIRE) -> str:
        """Issue a task: every job on the topic runs, once each. Returns the task's id once it is durable.

        :param content: a dict.
        :param expire: seconds within which it must be taken; None: whenever.
        :raises TypeError: content that is no dict.
        :raises QueueFull: too many are waiting.
        """
        return await self._verbs.send(topic, {} if content is None else content, expire)

    async def waitfor(self, taskid: str, timeout: float | None = None) -> Any:
        """The record of a task as an `MU`, once all of its runs have ended.

        :raises ExpirationError: nobody took it in time.
        :raises TimeoutError: not within `timeout` seconds.
        """
        turn = current_turn.get(None)
        if turn is None:
            record = await self._verbs.waitfor(taskid, timeout)
        else:
            async with turn.given_back():
                record = await self._verbs.waitfor(taskid, timeout)
        return mu(msgspec.to_builtins(record))

    def job_task(self, taskid: str, topic: str, content: Any) -> JobTask:
        """`task` in a job's script."""
        return JobTask({"taskid": taskid, "topic": topic, "content": content}, self.send)


def content_of(value: Any) -> dict[str, Any]:
    """What may be sent as a task's content.

    :raises TypeError: it is no dict.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"the content of a task is a dict, not {type(value).__name__}")
    made: dict[str, Any] = plain(value)
    return made
