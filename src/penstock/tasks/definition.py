"""`TaskFunction`: a function that was declared a task, and how to ask for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar

import msgspec

from penstock.client.handles import Handle
from penstock.client.tasks import check_terms
from penstock.clock import is_backoff, is_seconds
from penstock.delivery.arguments import Binding, Shape
from penstock.delivery.route import Policy, Route
from penstock.errors import ConfigError
from penstock.options import Actions
from penstock.tasks.limits import Rate, parse_rate
from penstock.tasks.signature import Signature, Task
from penstock.terms import Reply, Terms

if TYPE_CHECKING:
    from penstock.client import Client

P = ParamSpec("P")
R = TypeVar("R")

Isolation = Literal["auto", "thread", "process"]
ISOLATIONS = ("auto", "thread", "process")

USING = (
    "priority",
    "expires",
    "delay",
    "unique",
    "retries",
    "backoff",
    "result_ttl",
    "headers",
    "key",
    "persistent",
    "timeout",
)
"""The keywords of `using`."""
FOR_CALLS = ("priority", "expires", "headers", "persistent", "timeout")


class TaskPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a task: the keywords of `App.task`, with its defaults."""

    timeout: float | None = None
    isolation: Isolation = "auto"
    retries: int = 0
    backoff: tuple[float, float] = (1, 300)
    priorities: int = 10
    concurrency: int = 1
    cluster_limit: int | None = None
    rate_limit: Rate | None = None
    expires: float | None = None
    result_ttl: float | None = 86_400


def make_policy(given: Mapping[str, Any]) -> TaskPolicy:
    """:raises ConfigError: a value that cannot be."""
    for name, least, most in (("retries", 0, None), ("priorities", 0, 10), ("concurrency", 1, None)):
        _whole(name, given[name], least, most)
    if given["cluster_limit"] is not None:
        _whole("cluster_limit", given["cluster_limit"], 1, None)
    for name in ("timeout", "expires", "result_ttl"):
        value = given[name]
        if value is not None and not is_seconds(value, above_zero=name != "result_ttl"):
            raise ConfigError(f"{name} must be a number of seconds above 0 or None, not {value!r}")
    if given["isolation"] not in ISOLATIONS:
        raise ConfigError(f"isolation must be one of {', '.join(ISOLATIONS)}, not {given['isolation']!r}")
    backoff = given["backoff"]
    if not is_backoff(backoff):
        raise ConfigError(f"backoff must be (first, longest) in seconds, not {backoff!r}")
    rate = None if given["rate_limit"] is None else parse_rate(given["rate_limit"])
    return TaskPolicy(**{**given, "backoff": tuple(backoff), "rate_limit": rate})


class TaskFunction(Generic[P, R]):
    """A declared task. Called, it is the function itself; `send`, `call` and `using` go through its queue."""

    def __init__(
        self,
        function: Callable[P, R],
        name: str,
        topics: tuple[str, ...],
        policy: TaskPolicy,
        client: Callable[[], Client],
        app: Any = None,
        max_length: int | None = None,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.app = app
        self.name = name
        self.topics = topics
        self.policy = policy
        self.signature = Signature(function)
        self._client = client
        self.route = Route(
            name=name,
            queues=(name,),
            topics=topics,
            handler=function,
            binding=Binding(Shape.MESSAGE, self.signature.decode),
            policy=Policy(
                concurrency=policy.concurrency,
                on_exception=Actions.REJECT,
                max_attempts=None,
                backoff=policy.backoff,
                priorities=policy.priorities,
            ),
            broker=None,
            vhost=None,
            prefetch=policy.concurrency,  # or a priority would mean nothing
            max_length=max_length,
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function, here and now."""
        return self.function(*args, **kwargs)

    def call_plain(self, *args: Any, **kwargs: Any) -> Any:
        """The function with arguments that have been JSON meanwhile: in a process of its own."""
        function: Callable[..., Any] = self.function
        plain, keywords, task = self.signature.without_task(args, kwargs)
        bound = self.signature.bind({"args": plain, "kwargs": keywords}, arguments=True)
        if task is None:
            return function(*bound.args, **bound.kwargs)
        args, kwargs = self.signature.with_task(bound, Task(**task))
        return function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {self.name!r}>"

    async def send(self, *args: P.args, **kwargs: P.kwargs) -> Handle:
        """Have it run, by whoever takes it; returns once that is durable.

        :raises InvalidArguments: the function could not be called so.
        :raises PublishError, …: as `Client.send`.
        """
        return await self.using().send(*args, **kwargs)

    async def call(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Have it run, and wait for its answer: what the function is annotated to return.

        :raises InvalidArguments: the function could not be called so.
        :raises RemoteError, TimeoutError, …: as `Client.call`.
        """
        return await self.using().call(*args, **kwargs)

    def using(self, **options: Any) -> Using:
        """The same with other terms: `priority`, `expires`, `delay`, `unique`, `retries`, `backoff`,
        `result_ttl`, `headers`, `key`, `persistent`, `timeout`, as in `Client.send` and `Client.call`.

        :raises TypeError: an option there is not.
        :raises ValueError: `retries`, `backoff` or `result_ttl` that cannot be; the others are checked when it is sent.
        """
        unknown = [name for name in options if name not in USING]
        if unknown:
            raise TypeError(f"using() takes {', '.join(USING)}, not {', '.join(unknown)}")
        check_terms(Terms(**{name: options[name] for name in ("retries", "backoff", "result_ttl") if name in options}))
        return Using(self, options)


class Using:
    """A task on terms of its own."""

    def __init__(self, task: TaskFunction[Any, Any], options: dict[str, Any]) -> None:
        self._task = task
        self._options = options

    async def send(self, *args: Any, **kwargs: Any) -> Handle:
        """As `TaskFunction.send`."""
        task, given = self._task, self._options
        asked = Terms(
            arguments=True,
            retries=given.get("retries"),
            backoff=given.get("backoff"),
            result_ttl=given.get("result_ttl", task.policy.result_ttl),
        )
        options: dict[str, Any] = {
            name: given[name] for name in ("priority", "delay", "headers", "key", "persistent") if name in given
        }
        options["expires"] = given.get("expires", task.policy.expires)
        body = task.signature.encode(args, kwargs)
        timeout = given.get("timeout", 30)
        client = task._client()
        sent = await client._send_task(task.name, body, asked, given.get("unique"), options, timeout, None)
        return Handle(sent, client, task.signature.typed)

    async def call(self, *args: Any, **kwargs: Any) -> Any:
        """As `TaskFunction.call`.

        :raises TypeError: an option that only `send` has.
        """
        return self._task.signature.typed((await self._call(args, kwargs)).value)

    async def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reply:
        task, given = self._task, self._options
        unfit = [name for name in given if name not in FOR_CALLS]
        if unfit:
            raise TypeError(f"a call takes {', '.join(FOR_CALLS)}, not {', '.join(unfit)}")
        options = {name: value for name, value in given.items() if name != "timeout"}
        options.setdefault("expires", task.policy.expires)
        body = task.signature.encode(args, kwargs)
        return await task._client()._call_task(task.name, body, True, options, given.get("timeout", 30), None)


def _whole(name: str, value: Any, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        upper = f" to {most}" if most is not None else " or more"
        raise ConfigError(f"{name} must be a whole number, {least}{upper}, not {value!r}")
