"""Dead letters on every system: what is chosen goes, and what stays is what it was."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from penstock import Actions, App, Message
from penstock.brokers.base import Broker
from penstock.control import dead_letters
from penstock.control.brokers import connected
from penstock.control.dead_letters import Outcome, Selection
from tests.helpers import eventually

pytestmark = pytest.mark.blocks  # the command line opens what it asks in a loop of its own

BODIES = [{"n": 0}, "text", b"\xff\x00", ["three"]]


@asynccontextmanager
async def buried(url: str) -> AsyncIterator[tuple[Broker, list[str]]]:
    """A broker with as many dead letters as bodies, and their ids."""
    app = App(url)

    @app.route("work", on_exception=Actions.REJECT)
    async def work(message: Message) -> None:
        raise ValueError("no good")

    async with AsyncExitStack() as stack:
        async with app:
            ids = await app.publish_many("work", BODIES)
            broker = await stack.enter_async_context(connected(url))

            async def all_dead() -> bool:
                return await dead_letters.count(broker, "work") == len(BODIES)

            await eventually(all_dead, "all are dead")
        yield broker, ids


async def _left(broker: Broker) -> dict[str, object]:
    async def found() -> dict[str, object]:
        return {one.id: one.body for one in (await dead_letters.look(broker, "work", 100)).letters}

    count = await dead_letters.count(broker, "work")

    async def all_there() -> bool:
        return len(await found()) == count

    await eventually(all_there, "what was held is back")
    return await found()


@pytest.mark.parametrize("verb", ["replay", "discard"])
@pytest.mark.parametrize("chosen", ["id", "limit", "nothing", "a reason that none has"])
async def test_those_that_are_not_chosen_stay_as_they_were(broker_url: str, verb: str, chosen: str) -> None:
    async with buried(broker_url) as (broker, ids):
        before = await _left(broker)
        assert list(before) == ids
        selection = {
            "id": Selection(ids=frozenset({ids[1]})),
            "limit": Selection(limit=2),
            "nothing": Selection(ids=frozenset({"nono"})),
            "a reason that none has": Selection(reason="crashed"),
        }[chosen]
        outcome = Outcome()
        await (dead_letters.replay if verb == "replay" else dead_letters.discard)(broker, "work", selection, outcome)
        gone = {"id": {ids[1]}, "limit": set(ids[:2])}.get(chosen, set())
        assert (outcome.done, outcome.missing) == (len(gone), {"nono"} if chosen == "nothing" else frozenset())
        assert await _left(broker) == {id: body for id, body in before.items() if id not in gone}


async def test_what_stayed_can_still_be_replayed_and_has_its_body(broker_url: str) -> None:
    async with buried(broker_url) as (broker, ids):
        await dead_letters.discard(broker, "work", Selection(ids=frozenset({ids[1]})), Outcome())
        outcome = Outcome()
        await dead_letters.replay(broker, "work", Selection(), outcome)
        assert outcome.done == len(BODIES) - 1
        app, seen = App(broker_url), dict[str, object]()

        @app.route("work")
        async def work(message: Message) -> None:
            seen[message.id] = message.body

        async with app:
            await eventually(lambda: len(seen) == len(BODIES) - 1, "all come again")
        expected = dict(zip(ids, BODIES, strict=True))
        del expected[ids[1]]
        assert seen == expected
