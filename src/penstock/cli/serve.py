"""`penstock serve`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from penstock import config, logs, running
from penstock.cli.command import Call, UsageError, accepted
from penstock.cli.output import note
from penstock.errors import ConfigError, StoreRequired
from penstock.stores import registry as stores

if TYPE_CHECKING:
    from penstock.life import Life
    from penstock.node.node import Node, NodeOptions
    from penstock.node.notify import Notify


def serve(
    call: Call,
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", exists=True, file_okay=False, help="With the definitions; all paths begin here."),
    ],
    host: Annotated[str | None, typer.Option("--host", "-H", help="To serve HTTP at.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option("--port", "-P", min=0, max=65535, help="[default: 8470]")] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            "--allowed_host",
            metavar="NAME",
            help="A further name to answer to, a proxy's say; may be repeated.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of this node.  [default: the host's]")] = None,
    install: Annotated[bool, typer.Option("--install", help="Install what requirements.txt lists first.")] = False,
    worker_watch_interval: Annotated[
        float | None,
        typer.Option(
            "--worker-watch-interval",
            "--worker_watch_interval",
            metavar="SECONDS",
            help="Between the end of a worker's run and the next one.  [default: 10]",
        ),
    ] = None,
    job_queue_size: Annotated[
        int | None,
        typer.Option(
            "--job-queue-size",
            "--job_queue_size",
            metavar="N",
            help="Tasks that may wait for each job.  [default: 65535]",
        ),
    ] = None,
    job_queue_bulk_read_size: Annotated[
        int | None,
        typer.Option(
            "--job-queue-bulk-read-size",
            "--job_queue_bulk_read_size",
            metavar="N",
            help="Tasks that are read at once, and run at once.  [default: 32]",
        ),
    ] = None,
    amqp_url: Annotated[
        str | None, typer.Option("--amqp-url", "--amqp_url", metavar="URL", help="RabbitMQ, to carry the tasks.")
    ] = None,
    console: Annotated[bool, typer.Option("--console", help="Let `penstock shell` run code in the node.")] = False,
    job_transaction_event: Annotated[
        bool,
        typer.Option(
            "--job-transaction-event",
            "--job_transaction_event",
            help="Send a task on Transaction.<Status> for each step of a transaction's life.",
        ),
    ] = False,
) -> None:
    """Host workers, jobs and functions that YAML files define, with HTTP: until SIGTERM or SIGINT."""
    from penstock.app import App  # only this command's: they cost some tenths of a second
    from penstock.node.folder import Folder
    from penstock.node.node import Node

    accepted("--amqp-url", amqp_url, _check_amqp)
    here = Path.cwd()
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(f"{folder} is not a directory to work in: {error.strerror}") from None
    settings = config.load()
    signal.signal(signal.SIGTERM, _leave)
    logs.configure(call.log_level or settings.log_level, call.log_format)
    if not call.verbose:
        for noisy in ("uvicorn.error", "watchfiles.main"):  # they tell of each start, and of each file
            logging.getLogger(noisy).setLevel(logging.WARNING)
    options = _options(
        name=name,
        worker_watch_interval=_first(worker_watch_interval, settings.worker_watch_interval),
        job_queue_size=_first(job_queue_size, settings.job_queue_size),
        job_queue_bulk_read_size=_first(job_queue_bulk_read_size, settings.job_queue_bulk_read_size),
        console=console or settings.console,
        job_transaction_event=job_transaction_event or settings.job_transaction_event,
    )
    folder = Path.cwd()
    definitions = Folder(folder)
    if install or settings.install:
        signal.signal(signal.SIGTERM, _leave_behind_nothing)
        asyncio.run(definitions.install())
        signal.signal(signal.SIGTERM, _leave)
    definitions.read()  # all that is wrong with it is told before anything starts
    broker, store = _urls(call, settings, here, folder, amqp_url or settings.amqp_url)
    node = Node(folder, App(broker, store=store), options)
    hosts = allowed_host or [one for text in settings.allowed_hosts.split(",") if (one := text.strip())]
    raise typer.Exit(running.consume(_Served(node, host or settings.host, _first(port, settings.port), hosts)))


class _Served:
    """A node with its HTTP, which answers before the node has started and until it has ended."""

    def __init__(self, node: Node, host: str, port: int, hosts: Sequence[str] = ()) -> None:
        self._node = node
        self._host = host
        self._port = port
        self._hosts = hosts
        self._stack = AsyncExitStack()
        self._systemd: Notify | None = None

    @property
    def grace(self) -> float:
        return self._node.grace

    @property
    def _life(self) -> Life | None:
        return self._node._life

    async def __aenter__(self) -> Node:
        from penstock.node.notify import Notify
        from penstock.web.server import serving

        async with AsyncExitStack() as stack:
            self._systemd = await stack.enter_async_context(Notify())
            served = await stack.enter_async_context(serving(self._node, self._host, self._port, hosts=self._hosts))
            if served.made:
                note(f"no token is configured: sign in at {served.sign_in_link()}")
            await stack.enter_async_context(self._node)
            self._systemd.ready()
            gc.collect()
            gc.freeze()  # what is there now stays: looking through it again and again costs more than all else
            self._stack = stack.pop_all()
        return self._node

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._systemd is not None and self._life is not None and not self._life.worn_out.is_set():
            self._systemd.stopping()  # one that is worn out becomes a new process of the same id, and goes on
        await self._stack.__aexit__(kind, error, trace)


def _urls(call: Call, settings: config.Config, here: Path, folder: Path, amqp: str | None) -> tuple[str, str]:
    """Broker and store of a node: by default one SQLite file in its directory.

    :raises ConfigError: a URL that no adapter serves.
    :raises StoreRequired: a store that is none.
    """
    default = f"sqlite:///{quote(str(folder / config.DEFAULT_DATABASE))}"
    broker = None if call.broker is None else config.anchored(call.broker, here)
    broker = broker or settings.broker or default
    store = None if call.store is None else config.anchored(call.store, here)
    store = store or settings.store or (broker if stores.serves(broker) else default)
    if not stores.serves(store):
        raise StoreRequired(f"a node ({config.mask(store)} cannot be one)")
    if amqp is not None:
        _check_amqp(amqp)
    return amqp or broker, store


def _check_amqp(url: str) -> None:
    """:raises ConfigError: it is not RabbitMQ's."""
    if not url.startswith(("amqp://", "amqps://")):
        raise ConfigError(
            f"{config.mask(url)} is no URL of RabbitMQ: amqp://user:password@host/; --broker takes others"
        )


def _options(**values: Any) -> NodeOptions:
    """:raises UsageError: a flag's value that cannot be; those of other sources were checked when they were read."""
    from penstock.node.node import NodeOptions

    try:
        return NodeOptions(**values)
    except ConfigError as error:
        raise UsageError(f"--{str(error).replace('_', '-')}") from None


def _first(given: Any, otherwise: Any) -> Any:
    return otherwise if given is None else given


def _leave(*_: Any) -> None:
    """SIGTERM before anything was received: there is nothing to finish."""
    os._exit(0)


def _leave_behind_nothing(*_: Any) -> None:
    """The same while another process works for us, which is to end first."""
    raise SystemExit(0)
