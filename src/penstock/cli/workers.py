"""`penstock workers`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from penstock.cli import remote
from penstock.cli.command import Call, with_node_options
from penstock.cli.output import clean, print_facts, print_json, print_table, seconds
from penstock.control.cluster import WorkerOnNode, WorkerView

app = typer.Typer(help="Workers of a node's cluster: list, show, restart, pause, resume.")

Name = Annotated[str, typer.Argument(metavar="NAME")]


@app.callback(invoke_without_command=True)
@with_node_options
def _list_by_default(call: Call) -> None:
    """Workers of a node's cluster: list (also without a word), show, restart, pause, resume."""
    _show_all(call, None)


@app.command("list")
@with_node_options
def _list(
    call: Call,
    category: Annotated[
        str | None, typer.Option("--category", metavar="LABEL", help="Only those with this one.")
    ] = None,
) -> None:
    """Every worker, and how it stands on each node."""
    _show_all(call, category)


def _show_all(call: Call, category: str | None) -> None:
    found = remote.required(call).get("/workers", list[WorkerView], category=category)
    if call.json:
        print_json(found)
        return
    now = time.time()
    rows = [[one.name, one.mode, *cells] for one in found for cells in _standings(one, now)]
    headers = ["worker", "mode", "state", "for", "runs", "failures", "node", "last error"]
    print_table(headers, rows, right=(3, 4, 5))


@app.command()
@with_node_options
def show(call: Call, name: Name) -> None:
    """One worker: where it is defined, how it stands on each node, what it has logged last."""
    found = remote.required(call).get(_path(name), WorkerView)
    if call.json:
        print_json(found)
        return
    facts = (
        ("name", found.name),
        ("category", found.category),
        ("mode", found.mode),
        ("interval", f"{found.watch_interval:g} s"),
        ("defined", f"{found.file}:{found.line}"),
        ("wanted", "paused" if found.paused else "running"),
    )
    print_facts(facts, 12)
    for one in found.nodes:
        print(f"\n{'node:':<12}{clean(one.node_name)} ({clean(one.node)})")
        print(f"{'state:':<12}{clean(one.state)} for {seconds(max(time.time() - one.since, 0.0))}")
        print(f"{'runs:':<12}{one.runs}, {one.failures} failed")
        if one.last_error is not None:
            print(f"{'last error:':<12}{clean(one.last_error)}")
        for number, line in enumerate(one.log):
            print(f"{'log:' if number == 0 else '':<12}{clean(line)}")


@app.command()
@with_node_options
def restart(call: Call, name: Name) -> None:
    """Have a worker's run end, wherever it is, and begin anew at once."""
    _do(call, name, "restart", "is told to begin anew")


@app.command()
@with_node_options
def pause(call: Call, name: Name) -> None:
    """Have a worker's run end, and begin no other until it is resumed."""
    _do(call, name, "pause", "is told to pause")


@app.command()
@with_node_options
def resume(call: Call, name: Name) -> None:
    """Have a paused worker run again."""
    _do(call, name, "resume", "is told to run again")


def _do(call: Call, name: str, verb: str, said: str) -> None:
    found = remote.required(call).post(f"{_path(name)}/{verb}", WorkerView)
    if call.json:
        print_json(found)
    else:
        print(f"{clean(name)} {said}")


def _path(name: str) -> str:
    return f"/workers/{remote.part(name)}"


def _standings(worker: WorkerView, now: float) -> list[list[str]]:
    if not worker.nodes:
        return [["paused" if worker.paused else "on no node", "-", "-", "-", "-", ""]]
    return [
        [
            _state(worker, one),
            seconds(max(now - one.since, 0.0)),
            str(one.runs),
            str(one.failures),
            one.node_name,
            one.last_error or "",
        ]
        for one in worker.nodes
    ]


def _state(worker: WorkerView, one: WorkerOnNode) -> str:
    return f"{one.state}, to pause" if worker.paused and one.state != "paused" else one.state
