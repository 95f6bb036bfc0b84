"""Metrics of a node: what it is like now, how it was for the last day, and both for Prometheus."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import msgspec

import penstock
from penstock.brokers.base import Admin, Broker
from penstock.clock import SYSTEM_CLOCK, Clock
from penstock.control.queues import QueueStatus, overview
from penstock.errors import BrokerError, one_line, printable
from penstock.stores.base import Put, Store

log = logging.getLogger("penstock.metrics")

# All in seconds.
INTERVAL = 15.0
"""Between two samples."""
STEP = 60.0
"""Between two that are kept."""
KEPT = 86_400.0
LOOK = 5.0
"""What looking at the queues may take."""
TICK = 1.0
"""Between two looks at how late the event loop is."""

MOST_QUEUES = 500
"""In a sample; of more only the first by name."""
PAGE = 500
PREFIX = "metrics/"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class QueueSample(msgspec.Struct, frozen=True, omit_defaults=True):
    """One queue at that time; None: the system cannot say."""

    name: str
    ready: int | None = None
    unsettled: int | None = None
    consumers: int | None = None
    dead: int | None = None
    oldest_s: float | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """A node at one moment."""

    at: float
    """Unix seconds."""
    node: str
    """The node's name."""
    uptime: float
    """Seconds since it began."""
    lag: float = 0.0
    """The most by which its event loop was late since the sample before, in seconds."""
    rss: int | None = None
    """Bytes of memory in use; None: this system does not tell."""
    cpu: float = 0.0
    """Seconds of processor time since the process began."""
    broker: bool = True
    """Whether the broker answered."""
    queues: list[QueueSample] = []
    """None at all where the broker did not answer, or tells nothing."""
    counts: dict[str, int] = {}
    """What has been counted since the process began, under names such as `tasks_sent`."""


Take: TypeAlias = Callable[[], Awaitable[Sample]]


class Metrics:
    """Samples a node every 15 s and keeps one a minute in the store, for a day. For one event loop.

    What a node kept is there again when it is started again; several nodes in one store keep theirs side by side.
    """

    def __init__(self, store: Store, sample: Take, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._sample = sample
        self._clock = clock
        self._mark = os.urandom(4).hex()  # two nodes may have one name
        self._late = 0.0
        self._kept_at: float | None = None
        self.now: Sample | None = None
        """The latest sample; None: none is taken yet."""

    async def run(self) -> None:
        """Sample for ever. What goes wrong is logged, and tried again with the next sample."""
        ticking = asyncio.create_task(self._tick())
        try:
            while True:
                begun = self._clock.monotonic()
                try:
                    await self.take()
                except Exception as error:  # the node works on without its metrics
                    log.warning("metrics: %s", one_line(error))
                await asyncio.sleep(max(INTERVAL - (self._clock.monotonic() - begun), TICK))
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)

    async def take(self) -> Sample:
        """A sample of now; it is kept if the last one that was is a minute old.

        :raises BrokerUnavailable: the store is away; `now` is the new sample all the same.
        """
        sample = await self._sample()
        late, self._late = self._late, 0.0
        self.now = sample = msgspec.structs.replace(sample, lag=max(late, sample.lag))
        moment = self._clock.monotonic()
        if self._kept_at is None or moment - self._kept_at >= STEP - TICK:
            step = int(sample.at // STEP)
            key = f"{PREFIX}{step:010d}/{self._mark}"
            await self._store.apply([Put(key, msgspec.json.encode(_writable(sample)), KEPT)])
            self._kept_at = moment
        return sample

    async def history(self, since: float | None = None, node: str | None = None) -> list[Sample]:
        """The samples that are kept, the oldest first: one a minute of each node, of the last day at most.

        Those after `since` (Unix seconds) only, and those of one node only, if told.

        :raises BrokerUnavailable: the store is away.
        """
        first = self._clock.time() - KEPT if since is None else since
        after: str | None = f"{PREFIX}{max(int(first // STEP), 0):010d}/"
        found: list[Sample] = []
        while after is not None:
            entries = await self._store.scan(PREFIX, after=after, limit=PAGE)
            samples = [sample for entry in entries if (sample := _read(entry.value)) is not None]
            found += [sample for sample in samples if sample.at > first and node in (None, sample.node)]
            after = entries[-1].key if len(entries) == PAGE else None
        return sorted(found, key=lambda sample: sample.at)  # within a minute the keys say nothing

    def prometheus(self) -> str:
        """The latest sample in the text format of Prometheus (`CONTENT_TYPE`)."""
        return "".join(_exposition(self.now))

    async def _tick(self) -> None:
        while True:
            begun = self._clock.monotonic()
            await asyncio.sleep(TICK)
            self._late = max(self._late, self._clock.monotonic() - begun - TICK)


class Sampler:
    """Takes samples of this process and of the queues of a broker: `Metrics(store, Sampler(…))`.

    `broker()` gives the connected one. `queues()` names those to look at where the system does not list its own.
    `counts()` are further counters, under names of letters, digits and `_`.
    """

    def __init__(
        self,
        node: str,
        broker: Callable[[], Awaitable[Broker]],
        queues: Callable[[], Sequence[str]] = tuple,
        counts: Callable[[], Mapping[str, int]] = dict,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._node = node
        self._broker = broker
        self._queues = queues
        self._counts = counts
        self._clock = clock
        self._begun = clock.monotonic()

    async def __call__(self) -> Sample:
        queues = await self._look()
        return Sample(
            at=self._clock.time(),
            node=self._node,
            uptime=round(self._clock.monotonic() - self._begun, 3),
            rss=await asyncio.to_thread(resident),
            cpu=round(time.process_time(), 3),
            broker=queues is not None,
            queues=queues or [],
            counts=dict(self._counts()),
        )

    async def _look(self) -> list[QueueSample] | None:
        """The queues; None: the broker does not answer."""
        try:
            async with asyncio.timeout(LOOK):
                broker = await self._broker()
                found = [] if broker.admin is None else await self._statuses(broker, broker.admin)
        except (BrokerError, TimeoutError) as error:
            log.debug("metrics: no look at the queues: %s", one_line(error))
            return None
        return [
            QueueSample(one.name, one.ready, one.unsettled, one.consumers, one.dead, one.oldest_s)
            for one in found[:MOST_QUEUES]
        ]

    async def _statuses(self, broker: Broker, admin: Admin) -> list[QueueStatus]:
        names: Sequence[str] = ()
        if not broker.capabilities.lists:
            there = {info.name for info in await admin.inspect(list(self._queues()))}
            names = [name for name in self._queues() if name in there]
            if not names:
                return []
        return (await overview(admin, names)).queues


def resident() -> int | None:
    """Bytes of memory that this process has in use; None: this system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _writable(sample: Sample) -> Sample:
    queues = [msgspec.structs.replace(one, name=printable(one.name)) for one in sample.queues]
    return msgspec.structs.replace(sample, node=printable(sample.node), queues=queues)


def _read(value: bytes) -> Sample | None:
    try:
        return msgspec.json.decode(value, type=Sample)
    except (msgspec.DecodeError, UnicodeError) as error:
        log.debug("metrics: a sample cannot be read: %s", one_line(error))
        return None


# -- Prometheus

_QUEUES: tuple[tuple[str, str, str], ...] = (
    ("ready", "queue_ready", "Messages that wait in a queue, with those under a delay."),
    ("unsettled", "queue_unsettled", "Messages of a queue in the hands of consumers."),
    ("consumers", "queue_consumers", "Consumers of a queue."),
    ("dead", "queue_dead", "Dead letters of a queue."),
    ("oldest_s", "queue_oldest_seconds", "Age of the oldest message that waits in a queue."),
)

Labels: TypeAlias = Mapping[str, str]


def _exposition(sample: Sample | None) -> Iterator[str]:
    yield from _family("info", "gauge", "The version of Penstock.", [({"version": penstock.__version__}, 1)])
    if sample is None:
        return
    yield from _family("broker_up", "gauge", "Whether the broker answers.", [({}, int(sample.broker))])
    yield from _family("uptime_seconds", "gauge", "Time since the node began.", [({}, sample.uptime)])
    yield from _family("loop_lag_seconds", "gauge", "The most by which the event loop was late.", [({}, sample.lag)])
    yield from _family("resident_memory_bytes", "gauge", "Memory in use.", [({}, sample.rss)])
    yield from _family("cpu_seconds_total", "counter", "Processor time.", [({}, sample.cpu)])
    yield from _family("sample_timestamp_seconds", "gauge", "When all of this was so.", [({}, sample.at)])
    for field, name, help in _QUEUES:
        yield from _family(name, "gauge", help, [({"queue": one.name}, getattr(one, field)) for one in sample.queues])
    for name, count in sorted(sample.counts.items()):
        plain = re.sub(r"[^a-zA-Z0-9_]", "_", name).removesuffix("_total")
        yield from _family(f"{plain}_total", "counter", f"{plain.replace('_', ' ')}.".capitalize(), [({}, count)])


def _family(name: str, kind: str, help: str, values: Sequence[tuple[Labels, float | None]]) -> Iterator[str]:
    """One metric, if anything is known of it."""
    known = [(labels, value) for labels, value in values if value is not None]
    if not known:
        return
    yield f"# HELP penstock_{name} {_escaped(help)}\n# TYPE penstock_{name} {kind}\n"
    for labels, value in known:
        told = ",".join(f'{label}="{_quotable(text)}"' for label, text in labels.items())
        yield f"penstock_{name}{{{told}}} {value!r}\n" if told else f"penstock_{name} {value!r}\n"


def _escaped(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace("\n", "\\n")


def _quotable(text: str) -> str:
    return _escaped(text).replace('"', '\\"')
