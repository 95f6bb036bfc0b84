"""`penstock call`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from penstock.cli import bodies
from penstock.cli.bodies import Body, Headers, Priority, seconds
from penstock.cli.command import Call
from penstock.cli.output import clean, print_json
from penstock.client import Client
from penstock.control.brokers import require_files
from penstock.control.tasks import plain


def call(
    call: Call,
    name: Annotated[str, typer.Argument(metavar="NAME", callback=bodies.name, help="The task's name.")],
    data: Body = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=0,
            callback=seconds,
            metavar="SECONDS",
            help="Wait no longer for the answer; the run is stopped then.",
        ),
    ] = 30.0,
    expires: Annotated[
        str | None, typer.Option(metavar="SECONDS|never", help="Give up if untaken by then. By default never.")
    ] = None,
    priority: Priority = 0,
    header: Headers = None,
) -> None:
    """Have a task answer, and print what it returned: text as it is, everything else as JSON."""
    options: dict[str, Any] = {"priority": priority, "timeout": timeout, "headers": bodies.headers(header)}
    options["expires"] = None if expires is None else bodies.expiry(expires)
    value = bodies.one(data)
    require_files(call.url)
    answer = plain(call.run(_call(Client(call.url, store=call.store_url), name, value, options)))
    if call.json or not isinstance(answer, str):
        print_json(answer)
    else:
        print(clean(answer, lines=True) if sys.stdout.isatty() else answer)


async def _call(client: Client, name: str, data: Any, options: dict[str, Any]) -> Any:
    async with client:
        return await client.call(name, data, **options)
