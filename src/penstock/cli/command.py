"""What every command has: the common options, its settings, its way of asking."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Iterable
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from penstock import config, logs
from penstock.brokers import registry
from penstock.cli.places import place_of
from penstock.client.publishing import resolve_store
from penstock.errors import ConfigError, near
from penstock.stores import registry as stores

T = TypeVar("T")
Word = TypeVar("Word", bound=str)


class UsageError(Exception):
    """A command that was put together wrongly: exit status 2."""


_COMMON: dict[str, tuple[Any, Any]] = {
    "broker": (Annotated[str | None, typer.Option("--broker", metavar="URL", help="The broker's URL.")], None),
    "store": (Annotated[str | None, typer.Option("--store", metavar="URL", help="The store's URL.")], None),
    "host": (Annotated[str | None, typer.Option("--host", "-H", help="RabbitMQ host, in place of a URL.")], None),
    "port": (Annotated[int | None, typer.Option("--port", "-P", help="RabbitMQ port.")], None),
    "as_json": (Annotated[bool, typer.Option("--json", is_eager=True, help="Print for programs.")], False),
    "verbose": (Annotated[bool, typer.Option("--verbose", "-v", help="Log at debug level, show tracebacks.")], False),
    "log_level": (Annotated[str | None, typer.Option("--log-level", help=", ".join(logs.LEVELS) + ".")], None),
    "log_format": (Annotated[str | None, typer.Option("--log-format", help=" or ".join(logs.FORMATS) + ".")], None),
}
_ASKED: dict[str, tuple[Any, Any]] = {
    "node": (Annotated[str | None, typer.Option("--url", metavar="URL", help="Ask the node there, over HTTP.")], None),
}


class Call:
    """One use of a command: its common options over environment and `penstock.toml`.

    :raises ConfigError: a `penstock.toml` that cannot be used.
    :raises UsageError: a log level or format that there is not; a URL that can never work; both a URL and a host;
        both a node and a broker.
    """

    def __init__(self, options: dict[str, Any], subcommand: str | None) -> None:
        self.subcommand = subcommand
        self.json: bool = options["as_json"]
        self.verbose: bool = options["verbose"]
        self.broker: str | None = accepted("--broker", options["broker"], registry.connect)
        self.store: str | None = accepted("--store", options["store"], stores.connect)
        self.host: str | None = options["host"]
        self.port: int | None = options["port"]
        log_level = one_of("--log-level", options["log_level"], logs.LEVELS)
        given_format = one_of("--log-format", options["log_format"], logs.FORMATS)
        if self.broker is not None and (self.host is not None or self.port is not None):
            raise UsageError("give --broker or --host and --port, not both")
        self._node: str | None = accepted("--url", options.get("node"), place_of)
        direct = any(one is not None for one in (self.broker, self.store, self.host, self.port))
        if self._node is not None and direct:
            raise UsageError("a node has its own broker and store: give --url without --broker, --store, -H and -P")
        self.settings = config.load()
        self.node_url: str | None = None if direct else self._node or self.settings.url or None
        """Of the node to ask: flag, then environment, then `penstock.toml`; None: none is told of, or a broker or
        store is, to be asked directly."""
        self.node_from_file = self._node is None and not config.secret("PENSTOCK_URL", os.environ)
        """It is `penstock.toml` that names it."""
        self.log_level: str | None = "debug" if self.verbose else log_level
        self.given_format: str | None = given_format
        self.log_format: str = self.given_format or ("json" if self.json else self.settings.log_format)
        logs.configure(self.log_level or "warning", self.log_format)

    @property
    def url(self) -> str:
        """The broker's URL: flag, then environment, then `penstock.toml`, then default."""
        if self.host is not None or self.port is not None:
            return config.amqp_url(self.host or "127.0.0.1", self.port or 5672)
        return self.broker or self.settings.broker or config.default_broker()

    @property
    def store_url(self) -> str | None:
        """The store's URL: as the broker's, but by default the broker's own where it can be a store too, else None.

        :raises ConfigError: a URL that no adapter serves.
        """
        return resolve_store(self.store, self.url)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Carry out something asynchronous."""
        return asyncio.run(work)

    def confirm(self, question: str, yes: bool) -> None:
        """Have the user agree to what cannot be undone.

        :raises UsageError: nobody can be asked.
        """
        if yes:
            return
        if not sys.stdin.isatty():
            raise UsageError("this cannot be undone and there is no terminal to ask at: say --yes")
        if not typer.confirm(question, err=True):
            print("nothing was removed", file=sys.stderr)
            raise typer.Exit(1)


def with_common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function `f(call, …)` as a command whose options are its own and the common ones.

    A common option may stand before or after the names of subcommands; the last one counts. Where the function has
    a parameter of that name, the option is its own.
    """
    return _command(function, _COMMON)


def with_node_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for what a node can be asked: `--url` too."""
    return _command(function, _COMMON | _ASKED)


def _command(function: Callable[..., Any], offered: dict[str, tuple[Any, Any]]) -> Callable[..., Any]:
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    taken = {parameter.name for parameter in own}
    shared = {name: option for name, option in offered.items() if name not in taken}

    @functools.wraps(function)
    def command(ctx: typer.Context, **values: Any) -> Any:
        given: dict[str, Any] = dict(ctx.obj or {})
        for name, (_, default) in shared.items():
            value = values.pop(name)
            if value != default:
                given[name] = value
        ctx.obj = given
        options = {name: given.get(name, default) for name, (_, default) in (_COMMON | shared).items()}
        if ctx.invoked_subcommand is not None:
            return None  # its turn comes, with these options below its own
        return function(Call(options, ctx.invoked_subcommand), **values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    common = [
        inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, (annotation, default) in shared.items()
    ]
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [context, *(parameter.replace(kind=keyword) for parameter in own), *common]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    hints = get_type_hints(function, include_extras=True)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {
        name: hint for name, hint in hints.items() if name not in ("call", "return")
    }
    del command.__wrapped__  # its signature is not the command's
    return command


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return logging.getLogger().isEnabledFor(logging.DEBUG)


def accepted(flag: str, value: str | None, check: Callable[[str], object]) -> str | None:
    """A flag's value that passes a check, which raises ConfigError; None: the flag was not given.

    :raises UsageError: it does not.
    """
    if value is not None:
        try:
            check(value)
        except ConfigError as error:
            raise UsageError(f"{flag}: {error}") from None
    return value


def one_of(flag: str, value: str | None, known: Iterable[Word]) -> Word | None:
    """A flag's value among those there are, however it is written; None: the flag was not given.

    :raises UsageError: it is none of them.
    """
    if value is None:
        return None
    for one in known:
        if one.lower() == value.lower():
            return one
    raise UsageError(f"{flag} {value}: it is one of {', '.join(known)}{near(value, known)}")
