"""`penstock check`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from penstock import running
from penstock.cli.command import Call
from penstock.cli.output import clean, print_json
from penstock.control import checking
from penstock.control.loading import load


def check(
    call: Call,
    target: Annotated[
        str, typer.Argument(metavar="MODULE:APP|DIR", help="The app; `:app` may be left out. Or a node's directory.")
    ],
) -> None:
    """Load an app and hold it against its brokers, or read a directory's definitions.

    Nothing is made or changed; exit status 1 on problems.
    """
    if os.path.isdir(target):
        _check_folder(call, target)
        return
    app = load(target, call.store)
    running.point(app, call.broker, call.host, call.port, call.store)
    report = call.run(checking.check(app))
    if call.json:
        print_json(report)
    else:
        _print(report)
    if not report.good:
        raise typer.Exit(1)


def _check_folder(call: Call, target: str) -> None:
    from penstock.node.documents import InvalidDefinitions  # what is a node's is imported by its commands alone
    from penstock.node.folder import Folder, all_of, missing_modules

    problems: list[str] = []
    notes: list[str] = []
    defined: list[dict[str, str]] = []
    try:
        found = Folder(Path(target)).read()
    except InvalidDefinitions as invalid:
        problems = [str(one) for one in invalid.problems]
    else:
        notes = [str(one) for one in missing_modules(found)]
        for one in all_of(found):
            kind = type(one).__name__.removesuffix("Definition").lower()
            defined.append({"kind": kind, "name": one.name, "place": str(one.place)})
    if call.json:
        print_json({"definitions": defined, "problems": problems, "notes": notes})
    else:
        for each in defined:
            print(clean(f"{each['kind']:<8} {each['name']}: {each['place']}"))
        for text in notes:
            print(clean(f"note     {text}"))
        for text in problems:
            print(clean(f"problem  {text}"))
        print("all is well" if not problems else f"{len(problems)} to look into")
    if problems:
        raise typer.Exit(1)


def _print(report: checking.Report) -> None:
    for route in report.routes:
        topics = f", bound to {', '.join(route.topics)}" if route.topics else ""
        print(clean(f"route    {route.handler}: {', '.join(route.queues)}{topics} on {route.broker}"))
    for task in report.tasks:
        topics = f", bound to {', '.join(task.topics)}" if task.topics else ""
        print(clean(f"task     {task.name}: {task.handler}{topics} on {task.broker}"))
    for schedule in report.schedules:
        print(clean(f"schedule {schedule.task}: {schedule.definition}, next {schedule.next or 'never'}"))
    for worker in report.workers:
        print(
            clean(f"worker   {worker.name}: {worker.handler}, {worker.mode}, again after {worker.watch_interval:g} s")
        )
    if report.tasks or report.workers:
        print(clean(f"store    {report.store or 'none: results are not kept'}"))
    for text in report.notes:
        print(clean(f"note     {text}"))
    for stale in report.stale:
        print(
            clean(f"stale    queue {stale.queue!r} is still bound to {stale.topic!r}, which is not declared any more")
        )
    for text in report.problems:
        print(clean(f"problem  {text}"))
    found = len(report.stale) + len(report.problems)
    print("all is well" if not found else f"{found} to look into")
