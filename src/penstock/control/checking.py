"""Checking an app against the message systems that it names, before it runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec

from penstock.app import DEAD_LETTERS, App
from penstock.brokers.base import Broker, QueueInfo
from penstock.config import mask
from penstock.control.brokers import connected, missing_file
from penstock.delivery.consumer import queues_of
from penstock.delivery.route import Route
from penstock.errors import BrokerError, ConfigError


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """A route that was looked at."""

    handler: str
    queues: tuple[str, ...]
    topics: tuple[str, ...]
    broker: str
    """The URL, without its password."""


class Stale(msgspec.Struct, frozen=True):
    """A binding in the system that the app does not declare any more: the queue still gets these messages."""

    queue: str
    topic: str


class Report(msgspec.Struct, kw_only=True):
    """What a check found. All is well without `problems` and `stale`."""

    routes: list[Checked] = []
    stale: list[Stale] = []
    problems: list[str] = []
    notes: list[str] = []

    @property
    def good(self) -> bool:
        return not self.problems and not self.stale


async def check(app: App) -> Report:
    """Look at an app's declarations and at its queues. Nothing is declared, made or changed."""
    report = Report()
    if not app.routes:
        report.problems.append("the app declares no route: it would consume nothing")
    groups: dict[tuple[str | None, str | None], list[Route]] = defaultdict(list)
    for route in app.routes:
        groups[route.broker, route.vhost].append(route)
    urls = app.client._pool.urls
    for (name, vhost), routes in groups.items():
        url = urls[name]
        for route in routes:
            queues, topics = route.queues, route.topics
            report.routes.append(Checked(handler=route.name, queues=queues, topics=topics, broker=mask(url)))
        await _check_broker(url, vhost, routes, report)
    if DEAD_LETTERS in urls:
        await _check_broker(urls[DEAD_LETTERS], None, [], report)
    return report


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
