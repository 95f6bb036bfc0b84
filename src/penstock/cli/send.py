"""`penstock send`."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Annotated, Any

import typer

from penstock.cli import bodies
from penstock.cli.bodies import Body, Headers, Priority, seconds
from penstock.cli.command import Call, UsageError
from penstock.cli.output import complain, note, print_json
from penstock.cli.records import print_outcome, print_tracebacks, why_not
from penstock.client import Client
from penstock.client.handles import Handle
from penstock.control.brokers import require_files
from penstock.control.tasks import readable
from penstock.errors import ExpirationError, StoreRequired
from penstock.stores.records import TaskRecord

log = logging.getLogger("penstock.cli")

EXPIRES = 10.0  # seconds, unless said otherwise
CONFIRM = 30.0  # seconds within which it is sent, unless --timeout says otherwise


def send(
    call: Call,
    topic: Annotated[
        str, typer.Argument(metavar="TOPIC", callback=bodies.name, help="A task's name, or a topic that tasks are on.")
    ],
    content: Body = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until all runs have ended and print what came of them.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=seconds,
            metavar="SECONDS",
            help="No longer than this. By default 30 to send it, any time to wait.",
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS|never",
            help=f"Nobody runs it if untaken by then. By default {EXPIRES:g}, counted from the end of --delay.",
        ),
    ] = None,
    priority: Priority = 0,
    delay: Annotated[
        float | None, typer.Option(min=0, callback=seconds, metavar="SECONDS", help="Not before then.")
    ] = None,
    unique: Annotated[
        str | None, typer.Option(metavar="KEY", help="No other on this topic with that key until this one has ended.")
    ] = None,
    retries: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Further attempts after a failure, in place of the task's.")
    ] = None,
    header: Headers = None,
) -> None:
    """Have every task on a topic run once with this content. Prints the task's id.

    A job of a node takes a JSON object, and {} if there is none: any other content is its failure. What the tasks of
    an app take is their own affair.

    It expires unless a worker takes it within 10 seconds: --expires says how long otherwise. With --wait
    the exit status is 1 unless all runs succeeded.
    """
    options: dict[str, Any] = {"priority": priority, "delay": delay, "unique": unique, "retries": retries}
    options["expires"] = _expiry(expires, delay)
    options["headers"] = bodies.headers(header)
    value = bodies.one(content)
    store = call.store_url
    require_files(call.url, store)
    if wait and store is None:
        raise StoreRequired("--wait")
    record = call.run(_send(call, Client(call.url, store=store), topic, value, options, wait, timeout))
    if record is not None:
        _print_record(call, readable(record))


async def _send(
    call: Call, client: Client, topic: str, content: Any, options: dict[str, Any], wait: bool, timeout: float | None
) -> TaskRecord | None:
    """Send it; its record once it has ended, if that is waited for."""
    until = None if timeout is None else time.monotonic() + timeout
    async with client:
        handle = await client.send(topic, content, timeout=CONFIRM if timeout is None else timeout, **options)
        if not wait:
            _print_id(call, handle)
            return None
        log.debug("task %s is sent; waiting for its end", handle)
        try:
            return await client.waitfor(handle, None if until is None else max(until - time.monotonic(), 0.0))
        except ExpirationError:
            return await handle.record()
        except asyncio.CancelledError:
            note(f"interrupted: task {handle} goes on (penstock tasks show {handle})")
            raise


def _expiry(given: str | None, delay: float | None) -> float | None:
    """:raises UsageError: nobody could take it before."""
    later = delay or 0.0
    if given is None:
        return later + EXPIRES
    expiry = bodies.expiry(given)
    if later and expiry is not None and expiry <= later:
        raise UsageError(f"--expires {given}: it could not be taken before, with --delay {later:g}")
    return expiry


def _print_id(call: Call, handle: Handle) -> None:
    if call.json:
        print_json({"taskid": str(handle)})
    else:
        print(handle)


def _print_record(call: Call, record: TaskRecord) -> None:
    if call.json:
        print_json(record)
    else:
        print_outcome(record)
    if record.state != "succeeded":
        if call.verbose:
            print_tracebacks(record)
        complain(why_not(record))
        raise typer.Exit(1)
