"""Checking an app against the message systems that it names, before it runs."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from penstock.app import App
from penstock.brokers.base import Broker, QueueInfo
from penstock.config import mask
from penstock.control.brokers import connected, missing_file, missing_store_file, remembered
from penstock.delivery.arguments import name_of
from penstock.delivery.consumer import queues_of
from penstock.delivery.route import Route
from penstock.errors import BrokerError, ConfigError
from penstock.life import DEAD_LETTERS
from penstock.stores.records import moment


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """A route that was looked at."""

    handler: str
    queues: tuple[str, ...]
    topics: tuple[str, ...]
    broker: str
    """The URL, without its password."""


class CheckedTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task that was looked at. Its queue has its name."""

    name: str
    handler: str
    topics: tuple[str, ...]
    broker: str
    """The URL, without its password."""


class CheckedSchedule(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule that was looked at."""

    task: str
    definition: str
    next: str | None
    """When it is due next; ISO 8601 with offset. None: never again."""


class CheckedWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that was looked at."""

    name: str
    handler: str
    mode: str
    watch_interval: float
    """Seconds."""


class Stale(msgspec.Struct, frozen=True):
    """A binding in the system that the app does not declare any more: the queue still gets these messages."""

    queue: str
    topic: str


class Report(msgspec.Struct, kw_only=True):
    """What a check found. All is well without `problems` and `stale`."""

    routes: list[Checked] = []
    tasks: list[CheckedTask] = []
    schedules: list[CheckedSchedule] = []
    workers: list[CheckedWorker] = []
    store: str | None = None
    """The URL, without its password."""
    stale: list[Stale] = []
    problems: list[str] = []
    notes: list[str] = []

    @property
    def good(self) -> bool:
        return not self.problems and not self.stale


async def check(app: App) -> Report:
    """Look at an app's declarations and at its queues. Nothing is declared, made or changed."""
    report = Report()
    if not app.routes and not app.workers:
        report.problems.append("the app declares no route, no task and no worker: it would do nothing")
    for worker in app.workers.values():
        handler, interval = name_of(worker.function), worker.watch_interval
        report.workers.append(
            CheckedWorker(name=worker.name, handler=handler, mode=worker.mode, watch_interval=interval)
        )
    groups: dict[tuple[str | None, str | None], list[Route]] = defaultdict(list)
    for route in app.routes:
        groups[route.broker, route.vhost].append(route)
    urls = app.client._pool.urls
    for (name, vhost), routes in groups.items():
        url = urls[name]
        _show(app, routes, mask(url), report)
        await _check_broker(url, vhost, routes, report)
    if DEAD_LETTERS in urls:
        await _check_broker(urls[DEAD_LETTERS], None, [], report)
    _show_schedules(app, report)
    await _check_store(app, report)
    return report


def _show(app: App, routes: Sequence[Route], broker: str, report: Report) -> None:
    tasks = {id(task.route): task for task in app.tasks.values()}
    for route in routes:
        topics, task = route.topics, tasks.get(id(route))
        if task is None:
            report.routes.append(Checked(handler=route.name, queues=route.queues, topics=topics, broker=broker))
        else:
            handler = name_of(task.function)
            report.tasks.append(CheckedTask(name=task.name, handler=handler, topics=topics, broker=broker))


def _show_schedules(app: App, report: Report) -> None:
    now = time.time()
    for one in app.schedules:
        due = one.next(now)
        next = moment(due) if math.isfinite(due) else None
        report.schedules.append(CheckedSchedule(task=one.name, definition=one.definition, next=next))


async def _check_store(app: App, report: Report) -> None:
    url = app.store
    if url is None or not app.tasks:
        return
    report.store = mask(url)
    try:
        missing = missing_store_file(url)
        if missing is not None:
            note = f"{missing} does not exist yet: it is made at the first start"
            report.notes += [note] if note not in report.notes else []
            return
        async with remembered(url):
            pass
    except (BrokerError, ConfigError) as error:
        report.problems.append(f"the store, {mask(url)}: {error}")


async def _check_broker(url: str, vhost: str | None, routes: Sequence[Route], report: Report) -> None:
    try:
        missing = missing_file(url)
        if missing is not None:
            report.notes.append(f"{missing} does not exist yet: it is made at the first start")
            return
        async with connected(url, vhost) as broker:
            for route in routes:
                report.problems += _unsupported(route, broker)
            if broker.admin is None:
                report.notes.append(f"{mask(url)} does not show its bindings: stale ones are not known")
                return
            names = [queue.name for route in routes for queue in queues_of(route)]
            infos = {info.name: info for info in await broker.admin.inspect(names)}
            if any(info.bindings is None for info in infos.values()):
                report.notes.append(f"{mask(url)} does not show its bindings: stale ones are not known")
    except (BrokerError, ConfigError) as error:
        report.problems.append(f"{mask(url)}: {error}")
        return
    for route in routes:
        _compare(route, infos, report)


def _unsupported(route: Route, broker: Broker) -> list[str]:
    able = broker.capabilities
    wants = {"ordered": route.policy.ordered and not able.ordered, "topics": bool(route.topics) and not able.topics}
    return [f"{route.name}: this message system has no {what}" for what, missing in wants.items() if missing]


def _compare(route: Route, infos: dict[str, QueueInfo], report: Report) -> None:
    for queue in queues_of(route):
        info = infos.get(queue.name)
        if info is None:
            if queue.name in route.queues:
                report.notes.append(f"queue {queue.name!r} does not exist yet: it is made at the first start")
            continue
        declared = {queue.name, *queue.topics}
        report.stale += [Stale(queue.name, topic) for topic in sorted(info.bindings or ()) if topic not in declared]
        if info.paused and queue.name in route.queues:
            report.notes.append(f"queue {queue.name!r} is paused")
