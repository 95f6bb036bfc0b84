"""The nodes that share a store, and the workers on them.

    node/<id>        a node that lives (`Presence`), written by itself again and again
    wanted/<worker>  what an operator wants of a worker (`Wanted`)
    wanted           touched with each change of one, for whoever follows them

A node that has gone vanishes by its entry's time to live.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec

from penstock.errors import ConfigError, UnknownWorker
from penstock.stores.base import ABSENT, Delete, Put, Store, Touch
from penstock.stores.keys import check_keys
from penstock.stores.scanning import all_under
from penstock.workers.definition import Mode
from penstock.workers.resident import State, WorkerStatus

BELL = "wanted"
"""The key to follow."""
PRESENT = 15.0
"""Seconds after its last word for which a node counts as present."""
TAIL = (5, 50)
"""Log lines of each worker that its node shows to the others: at least, and at most."""
ALL_LINES = 500  # of all of a node's workers together, unless they are many
TRIES = 20


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """What an operator wants of a worker, on whichever node it runs."""

    paused: bool = False
    restarts: int = 0
    """Grows with each wish that it begin anew."""


class WorkerOnNode(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker stands on a node."""

    node: str
    """The node's id."""
    node_name: str
    state: State
    since: float
    """Of that state; Unix seconds."""
    runs: int
    failures: int
    last_error: str | None
    log: list[str]
    """The last lines that it has logged there."""


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """A worker, wherever it runs."""

    name: str
    category: str | None
    mode: Mode
    watch_interval: float
    """Seconds."""
    paused: bool
    file: str
    line: int
    nodes: list[WorkerOnNode]


class Reported(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A worker, as its node tells of it."""

    name: str
    category: str | None
    mode: Mode
    watch_interval: float
    file: str
    line: int
    state: State
    since: float
    runs: int
    failures: int
    last_error: str | None
    log: list[str]


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """Stored at `node/<id>`: what a node says of itself."""

    name: str
    host: str
    pid: int
    version: str
    started_at: float
    url: str | None
    epoch: int | None
    """Of the master's office, on the node that holds it."""
    ready: bool
    workers: list[Reported]
    jobs: list[str]


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node that lives."""

    id: str
    name: str
    host: str
    pid: int
    version: str
    started_at: float
    """Unix seconds."""
    seen_at: float
    """When it last said that it lives; Unix seconds."""
    url: str | None
    """Of its HTTP."""
    master: bool
    epoch: int | None
    """Of the master's office; higher with each new master. None: this is not the master."""
    ready: bool
    """Connected and consuming."""
    workers: int
    jobs: int


class Cluster:
    """All nodes that share a store. For one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # -- looking

    async def nodes(self) -> Sequence[NodeView]:
        """By name."""
        present = await self._present()
        # A master that was lost counts as present for a while beside its successor.
        newest = max((one.epoch for one, _ in present.values() if one.epoch is not None), default=None)
        views = [
            NodeView(
                id=id,
                name=one.name,
                host=one.host,
                pid=one.pid,
                version=one.version,
                started_at=one.started_at,
                seen_at=seen_at,
                url=one.url,
                master=one.epoch is not None and one.epoch == newest,
                epoch=one.epoch if one.epoch == newest else None,
                ready=one.ready,
                workers=len(one.workers),
                jobs=len(one.jobs),
            )
            for id, (one, seen_at) in present.items()
        ]
        return sorted(views, key=lambda view: (view.name, view.started_at))

    async def workers(self) -> Sequence[WorkerView]:
        """By name."""
        wanted = await self.wanted()
        views: dict[str, WorkerView] = {}
        present = await self._present()
        for id in sorted(present):
            presence, _ = present[id]
            for one in presence.workers:
                view = views.get(one.name)
                if view is None:
                    view = views[one.name] = WorkerView(
                        name=one.name,
                        category=one.category,
                        mode=one.mode,
                        watch_interval=one.watch_interval,
                        paused=wanted.get(one.name, Wanted()).paused,
                        file=one.file,
                        line=one.line,
                        nodes=[],
                    )
                view.nodes.append(
                    WorkerOnNode(
                        node=id,
                        node_name=presence.name,
                        state=one.state,
                        since=one.since,
                        runs=one.runs,
                        failures=one.failures,
                        last_error=one.last_error,
                        log=one.log,
                    )
                )
        return [views[name] for name in sorted(views)]

    async def worker(self, name: str) -> WorkerView:
        """:raises UnknownWorker: no node has it."""
        views = {view.name: view for view in await self.workers()}
        if name not in views:
            raise UnknownWorker(name, views)
        return views[name]

    # -- what an operator wants

    async def restart(self, name: str) -> None:
        """Have a worker end, and begin anew at once, on every node that runs it.

        :raises UnknownWorker: no node has it.
        """
        await self._want(name, restart=True)

    async def pause(self, name: str) -> None:
        """Have a worker end, and run nowhere until `resume`. Idempotent.

        :raises UnknownWorker: no node has it.
        """
        await self._want(name, paused=True)

    async def resume(self, name: str) -> None:
        """Run it again. Idempotent.

        :raises UnknownWorker: no node has it.
        """
        await self._want(name, paused=False)

    async def wanted(self) -> dict[str, Wanted]:
        """By worker."""
        found = {}
        for entry in await all_under(self._store, "wanted/"):
            with contextlib.suppress(msgspec.DecodeError):  # of another version
                found[entry.key.partition("/")[2]] = _wanted(entry.value)
        return found

    async def forget(self, names: Sequence[str]) -> None:
        """Nothing is wanted any more of workers that are gone."""
        await self._store.apply([Delete(f"wanted/{name}") for name in names])

    async def _want(self, name: str, paused: bool | None = None, restart: bool = False) -> None:
        await self.worker(name)
        key = f"wanted/{name}"
        check_keys([key])
        for _ in range(TRIES):
            (entry,) = await self._store.get([key])
            old = Wanted() if entry is None else _wanted(entry.value)
            new = Wanted(old.paused if paused is None else paused, old.restarts + restart)
            expected = ABSENT if entry is None else entry.version
            done = await self._store.apply([Put(key, _encode(new), expect=expected), Put(BELL, b"", tell=True)])
            if done[0] is not None:
                return
        raise ConfigError(f"worker {name!r} is being changed by others all the time")

    # -- being there

    async def appear(self, id: str, presence: Presence) -> None:
        """Say that a node lives, for `PRESENT` seconds."""
        await self._store.apply([Put(f"node/{id}", _encode(presence), PRESENT)])

    async def stay(self, id: str) -> bool:
        """Say that it still does, as it was; False: nothing is known of it any more."""
        return (await self._store.apply([Touch(f"node/{id}", PRESENT)]))[0] is not None

    async def vanish(self, id: str) -> None:
        await self._store.apply([Delete(f"node/{id}")])

    async def _present(self) -> dict[str, tuple[Presence, float]]:
        """The nodes by their ids, each with when it was last heard of."""
        found = {}
        for entry in await all_under(self._store, "node/"):
            try:
                seen_at = (entry.expires_at or 0.0) - PRESENT
                found[entry.key.partition("/")[2]] = _presence(entry.value), seen_at
            except msgspec.DecodeError:  # of another version
                continue
        return found


def lines_of_each(workers: int) -> int:
    """Log lines that a node shows of each of so many workers."""
    least, most = TAIL
    return max(least, min(most, ALL_LINES // max(workers, 1)))


def reported(status: WorkerStatus, watch_interval: float, file: str, line: int, lines: int) -> Reported:
    """A worker of a node, as the others may see it, with so many lines of its log."""
    return Reported(
        name=status.name,
        category=status.category,
        mode=status.mode,  # type: ignore[arg-type]
        watch_interval=watch_interval,
        file=file,
        line=line,
        state=status.state,
        since=status.since,
        runs=status.runs,
        failures=status.failures,
        last_error=status.last_error,
        log=status.log[-lines:],
    )


_encode = msgspec.msgpack.Encoder().encode
_wanted = msgspec.msgpack.Decoder(Wanted).decode
_presence = msgspec.msgpack.Decoder(Presence).decode
