"""What happens in the demo: readings flow, a consumer is killed, the database is taken away, a consumer is killed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import Self
from urllib.parse import quote

from rich.console import Console
from rich.markup import escape

from demo import chart, database, ledger, verdict
from demo.chart import Mark
from demo.children import Child
from demo.database import FOLDER
from demo.ledger import BATCHES, PUBLISHED
from demo.verdict import Evidence, Kill
from penstock import ConfigError, config
from penstock.brokers import registry

PATIENCE = 15.0  # seconds for anything that should follow by itself
OURS = ("broker.db", "broker.db-wal", "broker.db-shm", "broker.db-lock", "alerts.db", "report.json",
        "published.jsonl", "batches.jsonl", "pipeline.log", "sensors.log")  # fmt: skip


class Stuck(Exception):
    """Something that should have followed did not."""


class Play:
    """One performance. On leaving, no process of it is left and the database is where it was.

    :raises ConfigError: a broker that separate processes cannot share.
    """

    def __init__(self, console: Console, broker: str | None) -> None:
        self.console = console
        self.broker = broker or f"sqlite:///{quote(str(FOLDER / 'broker.db'))}"
        registry.connect(self.broker)  # a URL that cannot be is told before anything starts
        if config.parse_url(self.broker).scheme == "memory":
            raise ConfigError("the demo kills processes: it needs a broker that outlives them")
        os.environ["PENSTOCK_BROKER"] = self.broker  # for the children, and for our own look at the pipeline
        self.children: list[Child] = []
        self.kills: list[Kill] = []
        self.marks: list[Mark] = []
        self.began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self.children:
            child.kill()
        database.bring_back()

    def perform(self) -> bool:
        """The whole of it; whether every claim held."""
        self._clear()
        database.create()
        consumer = self._start("demo.pipeline")
        self._wait(
            lambda: consumer.has_said("consuming "), "its queues are there"
        )  # or it misses what is published before
        sensors = self._start("demo.sensors")
        self.say(f"a consumer ({consumer.pid}) and a source ({sensors.pid}) of this machine's readings have started")
        self._wait(lambda: bool(BATCHES.ids("finished")), "readings are being stored")
        self._watch(2.5)
        self._tell_alerts()
        consumer = self._kill(consumer, "started")
        self._watch(1.0)
        self._outage(3.0)
        self._watch(1.5)
        consumer = self._kill(consumer, "stored")
        self._watch(1.0)
        self._finish(sensors, consumer)
        return self._conclude()

    # -- the scenes

    def _kill(self, consumer: Child, point: str) -> Child:
        """SIGKILL in the middle of a batch; its successor, once that has stored what was in hand."""
        hold = ledger.hold_at(point)
        hold.touch()
        try:
            self._wait(lambda: _last(consumer.pid) == "holding", "the consumer has begun a batch")
            consumer.kill()
        finally:
            hold.unlink()
        killed = _examine(consumer.pid)
        self.kills.append(killed)
        self.marks.append(Mark("X", f"kill {len(self.kills)}", killed.at, killed.at))
        where = {"started": "not yet stored", "stored": "stored, not yet acknowledged"}.get(killed.point, killed.point)
        self.say(f"[bold red]SIGKILL[/] to {consumer.pid} in mid-batch: {len(killed.batch)} readings {where}")
        successor = self._start("demo.pipeline")
        batch = set(killed.batch)
        self._wait(lambda: batch <= set(BATCHES.ids("stored", successor.pid)), "its successor has stored them")
        self.say(f"its successor ({successor.pid}) has taken them over and stored them")
        return successor

    def _outage(self, seconds: float) -> None:
        start = time.time()
        database.take_away()
        self.say("[bold red]the database is gone[/]: the store route pauses and its queue grows")
        seen = len(database.seen())
        self._watch(seconds)
        self.say(f"meanwhile the alerts route has seen {len(database.seen()) - seen} readings")
        database.bring_back()
        end = time.time()
        self.marks.append(Mark("-", "database away", start, end))
        waiting = set(PUBLISHED.ids("published"))
        self._wait(lambda: waiting <= set(BATCHES.ids("stored")), "what waited is stored")
        self.say(f"the database is back after {end - start:.1f} s, and what waited is stored")

    def _finish(self, sensors: Child, consumer: Child) -> None:
        """End the source, let the queues run empty, end the consumer."""
        self._stop(sensors)
        published = set(PUBLISHED.ids("published"))
        self.say(f"the source has ended; the broker confirmed {len(published)} readings")
        self._wait(
            lambda: published <= {id for id, _ in database.stored()} and published <= set(database.seen()),
            "the queues are empty",
            fatal=False,
        )
        self._stop(consumer)

    def _conclude(self) -> bool:
        dead, left = asyncio.run(self._look_into_queues())
        refusals = [event for event in BATCHES.events() if event["what"] == "refused"]
        evidence = Evidence(
            published=PUBLISHED.ids("published"),
            stored=database.stored(),
            seen=database.seen(),
            kills=self.kills,
            prefetch=_prefetch(),
            refused=[pair for event in refusals for pair in zip(event["ids"], event["attempts"], strict=True)],
            refusals=len(refusals),
            dead=dead,
            left=left,
        )
        claims = verdict.judge(evidence)
        holds = verdict.holds(claims)
        seconds = time.monotonic() - self.began
        report = {"holds": holds, "seconds": round(seconds, 1), "claims": [asdict(claim) for claim in claims]}
        (FOLDER / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        self._show(claims, seconds)
        return holds

    def _show(self, claims: list[verdict.Claim], seconds: float) -> None:
        cpu, memory = database.series("cpu"), database.series("memory")
        print_ = self.console.print
        print_()
        if cpu and memory:
            glyphs = chart.FULL if self.console.encoding.startswith("utf") else chart.ASCII
            print_(chart.draw(cpu, memory, self.marks, min(self.console.width, 100), glyphs))
            print_()
        print_(verdict.table(claims))
        kept = "[bold green]Nothing was lost[/]" if verdict.holds(claims) else "[bold red]A claim does not hold[/]"
        print_(f"{kept} ({seconds:.1f} s). The alerts route raised {len(database.alerts())} alerts.")
        path = escape(os.path.relpath(database.READINGS))
        print_(f"Look at the store with a dashboard tool: pip install datasette, datasette {path}", soft_wrap=True)

    # -- the props

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self.began:5.1f} s[/]  {text}", soft_wrap=True)

    def _start(self, module: str) -> Child:
        child = Child(module)
        self.children.append(child)
        return child

    def _stop(self, child: Child) -> None:
        """:raises Stuck: it did not end well."""
        status = child.stop()
        self.children.remove(child)
        if status:
            raise Stuck(f"{child.module} ended with status {status}:\n{child.last_words()}")

    def _watch(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._wait(lambda: time.monotonic() >= until, "", seconds=seconds + 1)

    def _wait(self, happened: Callable[[], bool], what: str, *, seconds: float = PATIENCE, fatal: bool = True) -> None:
        """Until it has happened, with a line that counts meanwhile; without `fatal` the verdict will tell.

        :raises Stuck: it does not happen, or a process has ended by itself.
        """
        until = time.monotonic() + seconds
        with self.console.status("") as status:
            while not happened():
                for child in self.children:
                    if not child.running and child.pid not in {kill.pid for kill in self.kills}:
                        raise Stuck(f"{child.module} has ended by itself:\n{child.last_words()}")
                if time.monotonic() > until:
                    if fatal:
                        raise Stuck(f"not within {seconds:g} s: {what}")
                    return
                if self.console.is_terminal:
                    stored = database.count()
                    status.update(
                        f"published {len(PUBLISHED.ids('published'))}, stored {'…' if stored is None else stored}"
                    )
                time.sleep(0.05)

    def _tell_alerts(self) -> None:
        for sensor, value, average in database.alerts()[-1:]:
            self.say(f"alert: {sensor} at {value:.0f} %, its average so far is {average:.0f} %")

    def _clear(self) -> None:
        """Away with an earlier run; nothing but what the demo itself makes is removed."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        database.bring_back()
        shutil.rmtree(database.STORE, ignore_errors=True)
        for name in OURS:
            (FOLDER / name).unlink(missing_ok=True)

    async def _look_into_queues(self) -> tuple[int | None, int | None]:
        """Dead letters, and messages left in the pipeline's queues; None where the system cannot say."""
        broker = registry.connect(self.broker)
        if broker.admin is None:
            return None, None
        await broker.open()
        try:
            dead = left = 0
            for queue in await broker.admin.inspect():
                if queue.ready is None or queue.unsettled is None:
                    return None, None
                if queue.name in ("store.dead", "alerts.dead"):
                    dead += queue.ready + queue.unsettled
                elif queue.name.partition(".")[0] in ("store", "alerts"):
                    left += queue.ready + queue.unsettled
            return dead, left
        finally:
            await broker.close()


def _last(pid: int) -> str | None:
    """What a consumer last wrote down."""
    return next((event["what"] for event in reversed(BATCHES.events()) if event["pid"] == pid), None)


def _examine(pid: int) -> Kill:
    """What a dead consumer was doing, by its own last words."""
    trail = [event for event in BATCHES.events() if event["pid"] == pid and event["what"] != "holding"]
    last = trail[-1]
    return Kill(pid, last["what"], tuple(last["ids"]), time.time())


def _prefetch() -> int:
    from demo.pipeline import PREFETCH  # only now: importing the pipeline declares the app

    return PREFETCH
