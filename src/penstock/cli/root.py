"""The commands put together, and how each ends."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import penstock
from penstock.cli import (
    call_command,
    check,
    config_command,
    dead,
    doctor,
    nodes,
    publish,
    queues,
    run_command,
    send,
    serve,
    shell,
    tasks,
    transactions,
    workers,
)
from penstock.cli.command import Call, UsageError, debugging, with_common_options, with_node_options
from penstock.cli.output import clean, complain, print_json
from penstock.errors import PenstockError, RemoteError, one_line

NAME = "penstock"

app = typer.Typer(
    help="Carries work from any message system to Python handlers, and never loses a message on the way.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(ctx: typer.Context, wanted: bool) -> None:
    if not wanted:
        return
    if ctx.params["as_json"]:  # it is looked at first, wherever it stands
        print_json({"version": penstock.__version__})
    else:
        print(f"{NAME} {penstock.__version__}")
    raise typer.Exit


@app.callback(invoke_without_command=True)
@with_common_options
def _root(
    call: Call,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, help="Print the version.")] = False,
) -> None:
    work, cluster = "run, serve, publish, send, call, queues, dead, tasks, transactions", "workers, nodes, shell"
    raise UsageError(f"say what to do: {work}, {cluster}, config, check or doctor (penstock --help tells more)")


app.command("run")(with_common_options(run_command.run))
app.command("serve")(with_common_options(serve.serve))
app.command("publish")(with_common_options(publish.publish))
app.command("send")(with_common_options(send.send))
app.command("call")(with_common_options(call_command.call))
app.add_typer(queues.app, name="queues")
app.add_typer(dead.app, name="dead")
app.add_typer(tasks.app, name="tasks")
app.add_typer(transactions.app, name="transactions")
app.add_typer(workers.app, name="workers")
app.command("nodes")(with_node_options(nodes.nodes))
app.command("shell")(with_node_options(shell.shell))
app.add_typer(config_command.app, name="config")
app.command("check")(with_common_options(check.check))
app.command("doctor")(with_common_options(doctor.doctor))


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line; the exit status."""
    try:
        status = app(args=list(arguments), prog_name=NAME, standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        sys.stdout = None  # nobody reads: nothing more to flush at the exit
        return 1
    except UsageError as error:
        complain(str(error))
        return 2
    except Exception as error:
        return _failed(error)
    return status if isinstance(status, int) else 0


def _failed(error: Exception) -> int:
    told = getattr(error, "format_message", None)  # the parser's own: wrongly used
    if told is not None:
        where = getattr(getattr(error, "ctx", None), "command_path", NAME)
        complain(f"{told()} ({where} --help tells more)")
        return 2
    if debugging():
        _show_where(error)
    known = isinstance(error, PenstockError | ValueError)
    for problem in getattr(error, "problems", ()):  # all that is wrong with some definitions
        complain(str(problem))
    if not hasattr(error, "problems"):
        complain(str(error) if known and str(error) else f"{one_line(error)} (unexpected; -v shows where)")
    return 1


def _show_where(error: Exception) -> None:
    """The traceback; of what was raised elsewhere, the one from there."""
    if isinstance(error, RemoteError) and error.traceback:
        print(clean(error.traceback.rstrip(), lines=True), file=sys.stderr)
    else:
        traceback.print_exception(error)
