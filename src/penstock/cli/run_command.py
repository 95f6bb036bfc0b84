"""`penstock run`."""

from __future__ import annotations

import os
import signal
import traceback
from typing import Annotated, Any

import typer

from penstock import logs, running
from penstock.cli.command import Call, debugging
from penstock.control.loading import load
from penstock.errors import ConfigError, PenstockError


def run(
    call: Call,
    target: Annotated[str, typer.Argument(metavar="MODULE:APP", help="The app; `:app` may be left out.")],
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, metavar="N", help="So many processes, restarted when one dies."),
    ] = None,
    reload: Annotated[bool, typer.Option("--reload", help="Start again when a *.py below here changes.")] = False,
) -> None:
    """Consume until SIGTERM or SIGINT: the first drains, the second cancels, the third leaves at once."""
    if processes is None and call.settings.processes < 1:
        raise ConfigError(f"processes must be a whole number above 0, not {call.settings.processes}")
    link = running.Link.from_environment()
    signal.signal(signal.SIGTERM, _leave)
    logs.configure(call.log_level or call.settings.log_level, call.log_format)
    supervised = processes is not None or call.settings.processes > 1 or reload
    if link is None and supervised:
        from penstock.processes import Supervisor

        supervisor = Supervisor(_arguments(call, target), processes or call.settings.processes, reload=reload)
        raise typer.Exit(supervisor.run())
    try:
        app = load(target, call.store)
        running.point(app, call.broker, call.host, call.port, call.store)
    except PenstockError as error:
        if link is None:
            raise
        if debugging():
            traceback.print_exception(error)
        link.tell(running.Report(error=str(error)))
        raise typer.Exit(1) from None
    raise typer.Exit(running.consume(app, link))


def _arguments(call: Call, target: str) -> list[str]:
    """The command line of a supervised process."""
    arguments = ["run", target, "--log-format", call.log_format]
    arguments += ["--log-level", call.log_level or call.settings.log_level]
    flags = {"--broker": call.broker, "--store": call.store, "--host": call.host, "--port": call.port}
    for flag, value in flags.items():
        if value is not None:
            arguments += [flag, str(value)]
    return arguments


def _leave(*_: Any) -> None:
    """SIGTERM before anything was received: there is nothing to finish."""
    os._exit(0)
