"""Broadcasting: to all who listen now, in whatever process; to nobody later."""

from __future__ import annotations

import asyncio

from penstock.brokers.base import Broker, Inbox
from penstock.message import Delivery
from penstock.testing.conformance.harness import Promises, System, ids, message


class BroadcastPromises(Promises):
    async def test_every_inbox_that_listens_gets_one_copy(self, system: System, broker: Broker) -> None:
        inboxes = [broker.inbox(), broker.inbox(), (await system.connect()).inbox()]
        for inbox in inboxes:
            await inbox.listen(frozenset({"news"}))
        sent = message("news", b"\x00 body", headers={"h": "v"})
        await broker.broadcast(sent)
        for inbox in inboxes:
            [heard] = await self._hear(system, inbox)
            assert (heard.id, heard.topic, heard.raw, heard.headers["h"]) == (sent.id, "news", b"\x00 body", "v")
            assert await inbox.receive(system.harness.quiet) == []

    async def test_only_what_it_listens_to_and_only_from_then_on(self, system: System, broker: Broker) -> None:
        early, late = message("news"), message("news")
        await broker.broadcast(early)
        inbox = broker.inbox()
        await inbox.listen(frozenset({"news", "more"}))
        await broker.broadcast(message("other"))
        await broker.broadcast(late)
        assert ids(await self._hear(system, inbox)) == [late.id]

    async def test_topics_can_be_changed(self, system: System, broker: Broker) -> None:
        inbox = broker.inbox()
        await inbox.listen(frozenset({"a"}))
        await inbox.listen(frozenset({"b"}))
        await broker.broadcast(message("a"))
        await broker.broadcast(wanted := message("b"))
        assert ids(await self._hear(system, inbox)) == [wanted.id]

    async def test_a_topic_added_later_is_heard_from_then_on_only(self, system: System, broker: Broker) -> None:
        inbox = broker.inbox()
        await inbox.listen(frozenset({"a"}))
        await broker.broadcast(message("b"))
        await broker.broadcast(before := message("a"))
        await inbox.listen(frozenset({"a", "b"}))
        await broker.broadcast(after := message("b"))
        heard: list[Delivery] = []
        while len(heard) < 2:
            heard += await self._hear(system, inbox)
        assert ids(heard) == [before.id, after.id]
        await inbox.listen(frozenset())
        await broker.broadcast(message("a"))
        assert await inbox.receive(system.harness.quiet) == []
        await inbox.listen(frozenset({"b"}))
        await broker.broadcast(again := message("b"))
        assert ids(await self._hear(system, inbox)) == [again.id]

    async def test_order_is_kept(self, system: System, broker: Broker) -> None:
        inbox = broker.inbox()
        await inbox.listen(frozenset({"news"}))
        sent = [message("news") for _ in range(50)]
        for one in sent:
            await broker.broadcast(one)
        heard: list[Delivery] = []
        while len(heard) < len(sent):
            heard += await self._hear(system, inbox)
        assert ids(heard) == ids(sent)

    async def test_a_waiting_inbox_is_woken(self, system: System, broker: Broker) -> None:
        inbox = (await system.connect()).inbox()
        await inbox.listen(frozenset({"news"}))
        receiving = asyncio.create_task(inbox.receive(system.harness.patience))
        await asyncio.sleep(0)
        await broker.broadcast(sent := message("news"))
        async with asyncio.timeout(system.harness.patience / 2):
            assert ids(await receiving) == [sent.id]

    async def test_nobody_listening_is_no_error_and_queues_get_nothing(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "news")
        await broker.broadcast(message("news"))
        assert await system.silent(system.consume(broker, queue))

    async def test_close_is_idempotent_and_wakes_a_blocked_receive(self, system: System, broker: Broker) -> None:
        inbox = broker.inbox()
        await inbox.listen(frozenset({"news"}))
        receiving = asyncio.create_task(inbox.receive(system.harness.patience))
        await asyncio.sleep(system.harness.quiet)
        await inbox.close()
        await inbox.close()
        async with asyncio.timeout(system.harness.patience / 2):
            assert await receiving == []
        await broker.broadcast(message("news"))

    async def test_a_closed_inbox_hears_nothing_and_its_life_has_ended(self, system: System, broker: Broker) -> None:
        fresh, inbox = broker.inbox(), broker.inbox()
        lives = fresh.life, inbox.life
        await inbox.listen(frozenset({"news"}))
        assert inbox.life == lives[1]
        for one, life in zip((fresh, inbox), lives, strict=True):
            await one.close()
            assert one.life > life
        await broker.broadcast(message("news"))
        for one in (fresh, inbox):
            async with asyncio.timeout(system.harness.patience / 2):
                assert await one.receive(system.harness.patience) == []

    async def test_an_inbox_closed_by_several_at_once_is_closed_once(self, system: System, broker: Broker) -> None:
        inbox = broker.inbox()
        await inbox.listen(frozenset({"news"}))
        await asyncio.gather(inbox.close(), inbox.close())
        await asyncio.gather(inbox.close(), broker.close())

    async def _hear(self, system: System, inbox: Inbox) -> list[Delivery]:
        heard = await inbox.receive(system.harness.patience)
        assert heard, "nothing was heard"
        return heard
