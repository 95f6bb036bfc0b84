"""`/queues`, and the dead letters of each."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request

from penstock.brokers.base import Broker
from penstock.control import dead_letters, queues
from penstock.control.brokers import admin_of
from penstock.control.dead_letters import Letters, Outcome, Selection
from penstock.control.queues import Overview, QueueStatus
from penstock.delivery.dead_letters import DeadLetter, Reason
from penstock.errors import BrokerUnavailable
from penstock.web.answers import Answer
from penstock.web.bodies import read_json
from penstock.web.desk import Desk
from penstock.web.schema import body, documented
from penstock.web.shown import shown
from penstock.web.site import queues_of, site_of
from penstock.web.trail import audited

router = APIRouter(tags=["queues"])


class QueueView(QueueStatus, frozen=True, kw_only=True):
    """One queue; null: the system cannot say."""

    paused: bool
    """Nothing of it is handed out."""


class Paused(msgspec.Struct, frozen=True):
    """Whether a queue is handed out."""

    queue: str
    paused: bool


class Purged(msgspec.Struct, frozen=True):
    """How many messages were removed."""

    queue: str
    purged: int


class Chosen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which dead letters; by default all."""

    ids: list[str] | None = None
    reason: Reason | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    """At most so many."""
    before: float | None = None
    """Only those that had died by then; Unix seconds, by default now."""


class Settled(msgspec.Struct, frozen=True):
    """What became of the dead letters that were chosen."""

    done: int
    stayed: int
    """Those that should have gone and could not."""
    why: str | None
    """Why the first of them could not."""
    missing: list[str]
    """Ids asked for that were not there."""
    before: float
    """When those that were chosen had died at the latest: to go on with the others, and none that has died since."""


_chosen = msgspec.json.Decoder(Chosen)

_QUEUE = QueueView(name="hello", ready=3, unsettled=1, consumers=1, dead=0, oldest_s=0.5, paused=False)
_LETTER = DeadLetter(
    id="01927f6f0c3a9d1e5b7c2a4f8e6d0b1c",
    queue="hello",
    reason="failed",
    error="KeyError: 'name'",
    traceback=None,
    attempts=10,
    origin="hello",
    time="2026-01-01T12:00:00Z",
    body={},
)


@router.get("/queues", responses=documented(list[QueueView], [_QUEUE], 501, 502))
async def overview(request: Request) -> Answer:
    """Every queue, by name: waiting, in hand, consumers, dead letters, age of the oldest; and whether it is paused."""
    found = await queues_seen(site_of(request).desk)
    return Answer([QueueView(**msgspec.structs.asdict(one), paused=one.name in found.paused) for one in found.queues])


@router.post("/queues/{queue:path}/purge", responses=documented(Purged, Purged("hello", 3), 404, 413, 415, 501, 502))
async def purge(request: Request, queue: str) -> Answer:
    """Remove every message that waits in a queue. The records of tasks among them stay `queued` until they expire, or
    are cancelled."""
    desk = site_of(request).desk
    async with audited(request, "queue.purge", queue) as deed:
        count = await queues.purge(admin_of(await desk.broker(), desk.app.url), queue)
        deed.detail = f"{count} messages"
        return Answer(Purged(queue, count))


@router.get("/queues/{queue:path}/dead", responses=documented(Letters, Letters([_LETTER], 1), 404, 422, 501, 502))
async def dead(
    request: Request,
    queue: str,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    newest: bool = False,
    id: str | None = None,
) -> Answer:
    """The oldest dead letters of a queue, or the newest, or the one with this id; and how many there are in all."""
    broker = await site_of(request).desk.broker()
    if id is not None:
        return await shown(
            request, Letters([await dead_letters.find(broker, queue, id)], await dead_letters.count(broker, queue))
        )
    return await shown(request, await dead_letters.look(broker, queue, limit, newest=newest))


@router.post(
    "/queues/{queue:path}/dead/replay",
    openapi_extra=body(Chosen, {"reason": "failed", "limit": 100}),
    responses=documented(Settled, Settled(3, 0, None, [], 1.8e9), 404, 408, 413, 415, 501, 502),
)
async def replay(request: Request, queue: str) -> Answer:
    """Put dead letters back into the queue they came from."""
    return await _settle(request, queue, "dead.replay", dead_letters.replay)


@router.post(
    "/queues/{queue:path}/dead/discard",
    openapi_extra=body(Chosen, {"ids": ["01927f6f0c3a9d1e5b7c2a4f8e6d0b1c"]}),
    responses=documented(Settled, Settled(1, 0, None, [], 1.8e9), 404, 408, 413, 415, 501, 502),
)
async def discard(request: Request, queue: str) -> Answer:
    """Remove dead letters for good."""
    return await _settle(request, queue, "dead.discard", dead_letters.discard)


@router.post("/queues/{queue:path}/pause", responses=documented(Paused, Paused("hello", True), 404, 413, 415, 501, 502))
async def pause(request: Request, queue: str) -> Answer:
    """Hand out nothing from a queue until it is resumed."""
    return await _pause(request, queue, True)


@router.post(
    "/queues/{queue:path}/resume", responses=documented(Paused, Paused("hello", False), 404, 413, 415, 501, 502)
)
async def resume(request: Request, queue: str) -> Answer:
    """Hand out a paused queue's messages again."""
    return await _pause(request, queue, False)


async def _settle(
    request: Request, queue: str, what: str, work: Callable[[Broker, str, Selection, Outcome], Awaitable[None]]
) -> Answer:
    chosen = await read_json(request, _chosen)
    outcome = Outcome()
    async with audited(request, what, queue) as deed:
        before = time.time() if chosen.before is None else chosen.before
        selection = Selection(
            ids=frozenset(chosen.ids or ()), reason=chosen.reason, limit=chosen.limit, before=chosen.before
        )
        broker = await site_of(request).desk.broker()
        try:
            if chosen.ids != []:
                await work(broker, queue, selection, outcome)
        except BrokerUnavailable as error:
            raise BrokerUnavailable(f"after {outcome.done} of them: {error}") from error
        finally:
            deed.detail = f"{outcome.done} letters"
        return Answer(Settled(outcome.done, outcome.stayed, outcome.why, sorted(outcome.missing), before))


async def _pause(request: Request, queue: str, paused: bool) -> Answer:
    desk = site_of(request).desk
    async with audited(request, "queue.pause" if paused else "queue.resume", queue):
        await queues.pause(admin_of(await desk.broker(), desk.app.url), queue, paused)
        return Answer(Paused(queue, paused))


async def queues_seen(desk: Desk) -> Overview:
    """All queues; where the system does not list them, those of this node."""
    broker = await desk.broker()
    admin = admin_of(broker, desk.app.url)
    if broker.capabilities.lists:
        return await queues.overview(admin)
    names = queues_of(desk)
    there = {info.name for info in await admin.inspect(names)} if names else set()
    known = [name for name in names if name in there]
    return await queues.overview(admin, known) if known else Overview(queues=[], paused=frozenset())
