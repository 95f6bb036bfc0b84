"""NATS under adversity: streams made anew, slow lines, frozen consumers, missing rights, other people's publishing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
import pytest_asyncio

from penstock.brokers import registry
from penstock.brokers.base import Ack, Move, Queue, Release
from penstock.brokers.nats import NatsBroker, everybody, headcount, names, publisher, source, wire
from penstock.brokers.nats import broker as nats_broker
from penstock.brokers.nats import line as line_
from penstock.brokers.nats import subscription as subscription_
from penstock.brokers.nats.api import Api
from penstock.errors import BrokerRefused, BrokerUnavailable, ConfigError, PublishError, Unroutable
from penstock.message import Delivery
from penstock.testing.conformance.harness import Harness, System, acks, ids, message, messages
from penstock.testing.faults import NatsNode, Proxy
from tests.conformance.test_nats_own import RIGHTS, server
from tests.helpers import eventually
from tests.servers import require

_spaces = itertools.count(1)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsNode]:
    require("nats")
    with NatsNode(tmp_path_factory.mktemp("nats")) as node:
        yield node


@pytest.fixture
def space() -> str:
    return f"adverse-{next(_spaces)}"


@pytest_asyncio.fixture
async def system(node: NatsNode, space: str) -> AsyncIterator[System]:
    system = System(Harness(connect=lambda: NatsBroker(node.url(space)), lease=1.0, quiet=0.15))
    yield system
    await system.close()


@pytest_asyncio.fixture
async def broker(system: System) -> Any:
    return await system.connect()


@pytest_asyncio.fixture
async def client(node: NatsNode) -> AsyncIterator[Any]:
    """The driver itself: somebody else."""
    client = await nats.connect(f"nats://127.0.0.1:{node.port}")
    yield client
    await client.close()


async def stored(client: Any, stream: str) -> int:
    return int((await client.jsm().stream_info(stream)).state.messages)


async def stopped(work: asyncio.Task[Any]) -> None:
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


def written_by(broker: Any) -> list[bytes]:
    """What goes over its line from now on."""
    wire_, heard = broker.link.current._client, []
    hand_over = wire_.hand_over

    def spy(data: bytes) -> None:
        heard.append(data)
        hand_over(data)

    wire_.hand_over = spy
    return heard


async def disconnect(broker: Any) -> None:
    line = broker.link.current
    line._client._transport.close()
    await eventually(lambda: line.closed)


class Tap:
    """Passes on to a server what clients say, and remembers it; lets nobody in while `closed`."""

    def __init__(self, port: int) -> None:
        self.said = bytearray()
        self.open = asyncio.Event()
        self.open.set()
        self.waiting = 0
        self._target = port
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Tap:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.waiting += 1
        back: asyncio.StreamWriter | None = None
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self.open.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            await asyncio.gather(self._pipe(reader, back, self.said), self._pipe(there, writer, bytearray()))
        for one in (writer, back):
            if one is not None:
                one.transport.abort()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bytearray) -> None:
        while data := await reader.read(65536):
            heard += data
            writer.write(data)
            await writer.drain()
        writer.close()


# -- addresses


async def test_a_server_that_speaks_no_tls_is_told_nothing(node: NatsNode, space: str) -> None:
    async with Tap(node.port) as tap:
        broker = registry.connect(f"tls://me:sesame@127.0.0.1:{tap.port}/{space}?timeout=2")
        with pytest.raises(BrokerRefused) as caught:
            await broker.open()
        await broker.close()
        assert "speaks no TLS" in str(caught.value)
        assert b"sesame" not in tap.said
        assert b"CONNECT" not in tap.said


async def test_a_handshake_that_can_never_work_is_refused_at_once(node: NatsNode) -> None:
    broker = NatsBroker(f"tls://127.0.0.1:{node.port}/?tls_first=true")
    began = time.monotonic()
    with pytest.raises(BrokerRefused):
        await broker.open()
    assert time.monotonic() - began < 3


async def test_files_that_are_no_certificates_are_refused(node: NatsNode, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("rubbish")
    broker = NatsBroker(f"tls://127.0.0.1:{node.port}/?cafile={rubbish}")
    with pytest.raises(BrokerRefused) as caught:
        await broker.open()
    assert "cafile" in str(caught.value)


@pytest.mark.parametrize("option", ["creds", "nkeys_seed"])
@pytest.mark.blocks
async def test_a_login_that_cannot_be_read_is_refused(node: NatsNode, tmp_path: Path, option: str) -> None:
    rubbish = tmp_path / "rubbish.creds"
    rubbish.write_text("rubbish")
    broker = NatsBroker(f"{node.url()}?{option}={rubbish}")
    with pytest.raises(BrokerRefused) as caught:
        await broker.open()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["a.*", "a.>", "a b", "a..b", "."])
def test_an_inbox_prefix_that_is_no_subject_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError):
        NatsBroker(f"nats://127.0.0.1/?inbox_prefix={prefix.replace(' ', '%20').replace('>', '%3E')}")


@pytest.mark.blocks
async def test_a_missing_right_to_receive_is_told_by_receive(tmp_path: Path) -> None:
    rights = RIGHTS.format(publish='{ deny: ["$JS.API.CONSUMER.MSG.NEXT.>"] }', subscribe='[">"]')
    with server(tmp_path, rights) as node:
        broker = NatsBroker(node.url(login="me:x"))
        await broker.open()
        await broker.declare(queue := Queue("work"))
        for ahead in (True, False):
            subscription = broker.subscribe([queue], prefetch=2, lease=30, on_lost=lambda _: None, ahead=ahead)
            with pytest.raises(BrokerRefused) as caught:
                await subscription.receive(1, 5)
            assert "lacks a right" in str(caught.value)
        await broker.close()


# -- streams made anew


@pytest.mark.parametrize("how", ["told", "on a new line", "after a beat"])
async def test_old_acknowledgements_destroy_nothing_in_a_stream_made_anew(
    system: System, broker: Any, client: Any, space: str, how: str
) -> None:
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 3))
    lost: list[Delivery] = []
    lease = 0.9 if how == "after a beat" else 30.0
    subscription = system.consume(broker, queue, prefetch=3, lease=lease, on_lost=lost.extend)
    held = await system.take(subscription, 3)
    if how != "told":
        broker._hear = broker.news._hear = lambda item: None
    stream = names.Names(space).stream("work")
    await client.jsm().delete_stream(stream)
    other = await system.connect()
    await other.declare(queue)
    await system.publish(other, messages("work", 3))
    if how == "on a new line":
        await disconnect(broker)
    elif how == "after a beat":
        await eventually(lambda: lost)
    assert ids(await subscription.settle(acks(held))) == ids(held)
    assert ids(lost) == ids(held)
    assert await stored(client, stream) == 3
    assert len(await system.drain(subscription)) == 3


async def test_a_deleted_consumer_takes_nothing_out_of_the_hand(
    system: System, broker: Any, client: Any, space: str
) -> None:
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 2))
    lost: list[Delivery] = []
    subscription = system.consume(broker, queue, prefetch=4, on_lost=lost.extend)
    held = await system.take(subscription, 2)
    stream = names.Names(space).stream("work")
    await client.jsm().delete_consumer(stream, names.CONSUMER)
    old = [one.token for one in held]
    receiving = asyncio.create_task(subscription.receive(2, 10))
    await eventually(lambda: all(one.token is not token for one, token in zip(held, old, strict=True)))
    assert not receiving.done()
    assert not lost
    assert list(await subscription.settle(acks(held))) == []
    assert await stored(client, stream) == 0
    receiving.cancel()


async def test_a_missing_stream_costs_the_other_queues_of_a_consumer_nothing(
    system: System, broker: Any, client: Any, space: str
) -> None:
    kept, gone = await system.declare(broker, "kept"), await system.declare(broker, "gone")
    await system.publish(broker, [message("kept"), message("gone")])
    subscription = system.consume(broker, kept, gone, prefetch=2, lease=1.2)
    held = await system.take(subscription, 2)
    await client.jsm().delete_stream(names.Names(space).stream("gone"))
    rival = system.consume(await system.connect(), kept, lease=1.2)
    assert await rival.receive(1, 2.5) == []
    [mine] = [one for one in held if one.queue == "kept"]
    assert not mine.lost
    assert list(await subscription.settle([Ack(mine)])) == []


async def test_bindings_that_were_lost_are_made_again_on_a_new_line(
    system: System, broker: Any, client: Any, space: str
) -> None:
    queue = await system.declare(broker, "work", topics=("news",))
    subscription = system.consume(broker, queue)
    receiving = await system.blocked(subscription)
    await client.jsm().delete_stream(f"{space}-bindings")
    await disconnect(broker)
    await eventually(lambda: subscription.consuming)
    sent = await system.publish(await system.connect(), [message("news")])
    assert ids(await system.woken(receiving)) == sent


@pytest.mark.parametrize("gone", ["bindings", "bindings, made anew", "all"])
async def test_who_consumes_makes_again_what_somebody_deleted(
    system: System, client: Any, space: str, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_broker, "LOOK", 0.2)
    broker = await system.connect()
    queue = await system.declare(broker, "work", topics=("news", "old"))
    assert broker.admin is not None
    await broker.admin.unbind("work", ["old"])
    subscription = system.consume(broker, queue)
    receiving = await system.blocked(subscription)
    for _ in range(2):
        streams = [f"{space}-bindings", f"{space}-notes", names.Names(space).stream("work")]
        for stream in streams if gone == "all" else streams[:1]:
            await client.jsm().delete_stream(stream)
        if "anew" in gone:
            await system.connect()
        sent: list[str] = []

        async def routable(sent: list[str] = sent) -> bool:
            given = message("news")
            sent.append(given.id)
            return not any(await (await system.connect()).publish([given]))

        await eventually(routable)
        assert ids(await system.woken(receiving)) == sent[-1:]
        assert subscription.consuming
        receiving = await system.blocked(subscription)
    assert [type(one) for one in await broker.publish([message("old")])] == [Unroutable]
    await stopped(receiving)


async def test_a_queue_that_was_unbound_is_not_bound_again_on_a_new_line_nor_when_it_is_made_again(
    system: System, broker: Any, client: Any, space: str
) -> None:
    queue = await system.declare(broker, "work", topics=("news",))
    subscription = system.consume(broker, queue)
    receiving = await system.blocked(subscription)
    other = await system.connect()
    await system.publish(other, [message("news")])
    assert not await subscription.settle(acks(await system.woken(receiving)))
    await system.admin(other).unbind("work", ["news"])
    await disconnect(broker)
    for _ in range(2):
        receiving = asyncio.create_task(subscription.receive(1, 10))
        await eventually(lambda: subscription.consuming)
        assert isinstance((await other.publish([message("news")]))[0], Unroutable)
        sent = await system.publish(other, [message("work")])
        taken = await system.woken(receiving)
        assert ids(taken) == sent
        assert not await subscription.settle(acks(taken))
        await client.jsm().delete_stream(names.Names(space).stream("work"))
        await disconnect(broker)


# -- leases


async def test_a_newcomer_with_a_shorter_lease_takes_nothing_from_the_living(system: System, broker: Any) -> None:
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 1))
    lost: list[Delivery] = []
    first = system.consume(broker, queue, lease=60.0, on_lost=lost.extend)
    [held] = await system.take(first)
    second = system.consume(await system.connect(), queue, lease=0.9)
    assert await second.receive(1, 2.5) == []
    assert not lost
    assert list(await first.settle([Ack(held)])) == []


async def test_a_purge_leaves_the_lease_alone(system: System, broker: Any, space: str) -> None:
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 1))
    await system.take(system.consume(broker, queue, lease=120.0))
    await system.admin(broker).purge("work")
    found = await Api(await broker.link.line(), 5).consumer(names.Names(space).stream("work"))
    assert found is not None
    assert found.ack_wait == 120.0


async def test_every_message_in_hand_is_told_at_each_beat(system: System, broker: Any) -> None:
    queue = await system.declare(broker, "work")
    subscription = system.consume(broker, queue, lease=3.0)
    written = written_by(broker)
    await system.publish(broker, messages("work", 1))
    [old] = await system.take(subscription)
    assert await subscription.receive(1, 0.8) == []  # the next one is young when the beat comes
    await system.publish(broker, messages("work", 1))
    [young] = await system.take(subscription)
    beat = await eventually(lambda: [data for data in written if b"+WPI" in data])
    assert old.token.ack in beat[0]
    assert young.token.ack in beat[0]


async def test_what_lay_on_a_frozen_consumers_line_is_not_taken_for_new(system: System) -> None:
    place, frozen = await system.elsewhere()
    queue = Queue("work")
    await place.run(system.declare(frozen, "work"))
    idle = frozen.subscribe([queue], prefetch=4, lease=1.0, on_lost=lambda _: None)
    broker = await system.connect()
    assert await place.run(idle.receive(4, 0.05)) == []  # a question is open
    place.freeze()
    await system.publish(broker, messages("work", 1))
    [held] = await system.take(system.consume(broker, queue, lease=1.0))
    place.thaw()
    assert await place.run(idle.receive(4, 0.3)) == []
    assert not held.lost


async def test_a_question_is_good_for_half_the_lease_however_long_one_waits(system: System, broker: Any) -> None:
    queue = await system.declare(broker, "work")
    for ahead in (True, False):
        subscription = system.consume(broker, queue, lease=2.0, ahead=ahead)
        await subscription.receive(1, 0)
        written = written_by(broker)
        receiving = asyncio.create_task(subscription.receive(1, 30))
        if not ahead:
            asked = await eventually(lambda: [data for data in written if b"MSG.NEXT" in data])  # noqa: B023
            assert b'"expires":1000000000' in asked[0]
            await eventually(lambda: len([data for data in written if b"MSG.NEXT" in data]) > 1)  # noqa: B023
        receiving.cancel()
        await subscription.close()


class Lost:
    """Has the first of what is written to some subject lost on its way, as with the death of who was to hear it."""

    def __init__(self, broker: Any, subject: bytes) -> None:
        self.what: bytes | None = None
        self._wire = broker.link.current._client
        self._hand_over, self._subject = self._wire.hand_over, subject
        self._wire.hand_over = self._write

    def _write(self, data: bytes) -> None:
        if self.what is None and self._subject in data:
            self.what = data
        else:
            self._hand_over(data)


async def test_a_question_that_nobody_knows_of_any_more_is_asked_anew(
    system: System, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when whoever led the consumer in a cluster has died. It would be good for 15 seconds."""
    monkeypatch.setattr(source, "PULSE", 0.3)
    monkeypatch.setattr(source, "SILENT", 0.9)
    monkeypatch.setattr(subscription_, "LOOK", 0.1)
    queue = await system.declare(broker, "work")
    lost = Lost(broker, b"MSG.NEXT")
    receiving = asyncio.create_task(system.consume(broker, queue, lease=30.0).receive(1, 30))
    await eventually(lambda: lost.what)
    began = time.monotonic()
    [sent] = await system.publish(broker, messages("work", 1))
    assert ids(await receiving) == [sent]
    assert time.monotonic() - began < 5


async def test_a_question_that_the_server_knows_of_stays_open(
    system: System, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "PULSE", 0.1)
    monkeypatch.setattr(source, "SILENT", 0.3)
    monkeypatch.setattr(subscription_, "LOOK", 0.05)
    queue = await system.declare(broker, "work")
    subscription = system.consume(broker, queue, lease=30.0)
    await subscription.receive(1, 0)
    written = written_by(broker)
    assert await subscription.receive(1, 1.2) == []
    assert not written
    assert subscription.consuming


@pytest.mark.parametrize("limit", ["SILENT", "LATE"])
async def test_a_message_may_take_longer_to_arrive_than_a_question_is_good_for(
    node: NatsNode, space: str, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Over a slow line all else comes behind it: nothing was heard of either queue, and neither is forgotten."""
    monkeypatch.setattr(source, "PULSE", 0.1)
    monkeypatch.setattr(source, "SILENT", 0.4 if limit == "SILENT" else 10.0)
    monkeypatch.setattr(source, "LONGEST", 0.4 if limit == "LATE" else 30.0)
    monkeypatch.setattr(source, "LATE", 0.1)
    monkeypatch.setattr(subscription_, "LOOK", 0.05)
    async with Proxy(node.port) as proxy:
        broker: Any = NatsBroker(node.url(space, proxy.port))
        await broker.open()
        queues = [Queue("work"), Queue("other")]
        for queue in queues:
            await broker.declare(queue)
        assert list(await broker.publish([large := message("work", bytes(900_000))])) == [None]
        proxy.throttle(500_000)
        subscription = broker.subscribe(queues, prefetch=2, lease=30, on_lost=lambda _: None)
        written = written_by(broker)
        [taken] = await subscription.receive(1, 20)
        assert (taken.id, taken.token.delivered) == (large.id, 1)
        assert b"UNSUB" not in b"".join(written)
        proxy.restore()
        await subscription.settle([Ack(taken)])
        await broker.close()


async def test_what_nobody_answers_is_asked_again(broker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_, "ASK_AGAIN", 0.05)
    lost = Lost(broker, b"STREAM.INFO")
    await broker.declare(Queue("work"))
    assert lost.what


async def test_settling_looks_again_when_it_had_to_wait_for_a_line(
    system: System, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = await system.declare(broker, "work")
    other = await system.declare(broker, "other")
    await system.publish(broker, messages("work", 2))
    subscription = system.consume(broker, queue, prefetch=2, lease=1.0)
    held = await system.take(subscription, 2)
    gate, line = asyncio.Event(), broker.link.line

    async def slow() -> Any:
        await gate.wait()
        return await line()

    monkeypatch.setattr(broker.link, "line", slow)
    settling = asyncio.create_task(subscription.settle([Ack(held[0]), Move(held[1], "other", held[1].outgoing())]))
    rival_broker = await system.connect()
    rival = system.consume(rival_broker, queue, lease=1.0)
    taken = await system.take(rival, 2)
    gate.set()
    assert sorted(ids(await settling)) == sorted(ids(held))
    assert await system.silent(system.consume(rival_broker, other))
    assert list(await rival.settle(acks(taken))) == []


# -- moves


async def test_a_message_may_grow_when_it_is_moved(system: System, broker: Any) -> None:
    queue, dead = await system.declare(broker, "work"), await system.declare(broker, "work.dead")
    line = await broker.link.line()
    most = line.largest - publisher.HEADROOM - len(wire.header_of(message("work", id="large"), "work")) - 16
    assert list(await broker.publish([message("work", bytes(most), id="large")])) == [None]
    subscription = system.consume(broker, queue)
    [held] = await system.take(subscription)
    grown = held.outgoing()
    grown.headers = {"why": "x" * 25_000}
    assert list(await subscription.settle([Move(held, "work.dead", grown)])) == []
    [moved] = await system.drain(system.consume(broker, dead))
    assert len(moved.raw) == most
    [outcome] = await broker.publish([message("work", bytes(most + 100))])
    assert isinstance(outcome, PublishError)
    [outcome] = await broker.publish([message("work", headers={"x": "y" * 40_000})])
    assert isinstance(outcome, PublishError)


async def test_a_move_makes_its_queue_again_if_it_has_gone(
    system: System, broker: Any, client: Any, space: str
) -> None:
    queue, dead = await system.declare(broker, "work"), await system.declare(broker, "work.dead")
    sent = await system.publish(broker, messages("work", 1))
    subscription = system.consume(broker, queue)
    [held] = await system.take(subscription)
    await client.jsm().delete_stream(names.Names(space).stream("work.dead"))
    assert list(await subscription.settle([Move(held, "work.dead", held.outgoing())])) == []
    assert ids(await system.drain(system.consume(broker, dead))) == sent


async def test_a_retry_within_a_full_queue_needs_no_room(system: System, broker: Any) -> None:
    queue = await system.declare(broker, "work", max_length=1)
    await system.publish(broker, [message("work", b"body", headers={"n": 0})])
    subscription = system.consume(broker, queue)
    [held] = await system.take(subscription)
    for count in (1, 2):
        again = held.outgoing()
        again.headers = {"n": count}
        assert list(await subscription.settle([Move(held, "work", again)])) == []
        [held] = await system.take(subscription)
        assert (held.headers, held.raw, held.redelivered) == ({"n": count}, b"body", 0)
    assert list(await subscription.settle([Release(held)])) == []
    [held] = await system.take(subscription)
    assert (held.headers, held.redelivered) == ({"n": 2}, 0)
    assert list(await subscription.settle([Ack(held)])) == []
    assert (await system.admin(broker).inspect(["work"]))[0].ready == 0


# -- notes


async def test_what_is_given_back_makes_the_notes_again(system: System, broker: Any, client: Any, space: str) -> None:
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 1))
    subscription = system.consume(broker, queue)
    [held] = await system.take(subscription)
    await client.jsm().delete_stream(f"{space}-notes")
    assert list(await subscription.settle([Release(held)])) == []
    [again] = await system.take(subscription)
    assert again.redelivered == 0


@pytest.mark.blocks
async def test_a_note_that_cannot_be_written_keeps_nothing_in_hand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rights = RIGHTS.format(publish='{ deny: ["penstock.note.>"] }', subscribe='[">"]')
    with server(tmp_path, rights) as node:
        system = System(Harness(connect=lambda: NatsBroker(node.url(login="me:x"))))
        broker = await system.connect()
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue)
        [held] = await system.take(subscription)
        with caplog.at_level(logging.WARNING, "penstock.nats"):
            assert list(await subscription.settle([Release(held)])) == []
        assert [record for record in caplog.records if "may count as lost" in record.getMessage()]
        [again] = await system.take(subscription)
        assert (again.id, again.redelivered) == (held.id, 1)
        await system.close()


# -- publishing


async def test_a_stream_that_is_there_and_silent_is_waited_for(
    system: System, broker: Any, client: Any, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between two leaders of a cluster: nobody hears what is published, and the stream is there."""
    await system.declare(broker, "work")
    await system.publish(broker, [message("work")])
    manager, stream = client.jsm(), names.Names(space).stream("work")
    config = (await manager.stream_info(stream)).config
    subjects, config.subjects = config.subjects, [f"{space}.elsewhere"]
    await manager.update_stream(config)
    publishing = asyncio.create_task(broker.publish([message("work")]))
    done, _ = await asyncio.wait({publishing}, timeout=0.5)
    assert not done
    config.subjects = subjects
    await manager.update_stream(config)
    assert list(await publishing) == [None]
    config.subjects = [f"{space}.elsewhere"]
    await manager.update_stream(config)
    monkeypatch.setattr(publisher, "ELECTION", 0.2)
    with pytest.raises(BrokerUnavailable):
        await broker.publish([message("work")])


async def test_a_slow_line_has_as_long_as_there_are_confirmations(node: NatsNode, space: str) -> None:
    async with Proxy(node.port) as proxy:
        broker = NatsBroker(node.url(space, proxy.port, timeout=1))
        await broker.open()
        await broker.declare(Queue("work"))
        proxy.throttle(3_000_000)
        assert list(await broker.publish([message("work", bytes(900_000)) for _ in range(10)])) == [None] * 10
        proxy.restore()
        await broker.close()


def test_what_is_published_together_is_bounded_in_bytes() -> None:
    large = [message("work", bytes(2**20)) for _ in range(20)]
    assert [len(part) for part in publisher._parts(large)] == [8, 8, 4]
    assert [len(part) for part in publisher._parts(messages("work", 2500))] == [1000, 1000, 500]
    assert list(publisher._parts([])) == []


async def test_what_the_engine_sends_on_is_no_duplicate(system: System, node: NatsNode, space: str) -> None:
    broker = NatsBroker(node.url(space, dedup="true"))
    await broker.open()
    await broker.declare(queue := Queue("work"))
    for headers in ({}, {"penstock-dead": "once"}, {"penstock-dead": "twice"}):
        for _ in range(2):
            assert list(await broker.publish([message("work", id="same", headers=headers)])) == [None]
    reader = await system.connect()
    assert len(await system.drain(system.consume(reader, queue))) == 3
    await broker.close()


# -- receiving


async def test_a_question_is_bounded_in_bytes(system: System, broker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = await system.declare(broker, "work")
    sent = await system.publish(broker, [message("work", bytes(size)) for size in (2000, 2000, 100_000, 10, 2000)])
    monkeypatch.setattr(source, "MOST_BYTES", 5000)
    monkeypatch.setattr(source, "FRAMING", -(2**20))
    written = written_by(broker)
    taken = await system.take(system.consume(broker, queue, prefetch=10), 5)
    assert ids(taken) == sent
    asked = [data for data in written if b"MSG.NEXT" in data]
    assert b'"max_bytes":5000' in asked[0]
    assert len(asked) > 2


# -- other people


async def test_only_inboxes_are_told_what_is_held(broker: Any, client: Any, space: str) -> None:
    heard = await client.subscribe("elsewhere.>")
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    await client.flush()
    await client.publish(f"{space}.who", b"")
    await client.publish(f"{space}.who", b"", reply="elsewhere.STREAM.PURGE")
    await client.publish(f"{space}.who", b"", reply=inbox)
    await answers.next_msg(5)
    assert heard.pending_msgs == 0
    assert broker.link.current is not None


async def test_in_a_cluster_one_listens_when_all_servers_have_heard_of_it(
    system: System, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever answers a question is on a server that has heard of what was listened to before."""
    monkeypatch.setattr(line_.Line, "has_peers", True)
    other: Any = await system.connect()
    written = written_by(broker)
    answers: list[bytes] = []
    answer = everybody.answer

    def late(line: Any, reply: bytes, text: bytes) -> None:
        answers.append(text)
        asyncio.get_running_loop().call_later(0.05, answer, line, reply, text)

    monkeypatch.setattr(headcount, "answer", late)
    inbox = broker.inbox()
    await inbox.listen(frozenset({"news"}))
    said = b"".join(written)
    assert 0 < said.index(b".cast.news") < said.index(b".who ")
    assert len(answers) == 2
    await other.broadcast(message("news"))
    assert [one.topic for one in await inbox.receive(5)] == ["news"]


async def test_who_is_cancelled_while_all_are_asked_leaves_nothing_on_the_line(broker: Any) -> None:
    line = broker.link.current
    before = set(line._handlers)
    asking = asyncio.create_task(broker.headcount.take(line))
    await eventually(lambda: set(line._handlers) - before)
    written = written_by(broker)
    await stopped(asking)
    assert set(line._handlers) == before
    assert b"UNSUB" in b"".join(written)


async def test_who_is_cancelled_before_all_servers_have_heard_of_it_asks_again(
    broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_.Line, "has_peers", True)
    written = written_by(broker)
    inbox = broker.inbox()
    listening = asyncio.create_task(inbox.listen(frozenset({"news"})))
    await eventually(lambda: b".who " in b"".join(written))
    await stopped(listening)
    for asked in (2, 2):
        await inbox.listen(frozenset({"news"}))
        assert b"".join(written).count(b".who ") == asked


async def test_a_reply_that_goes_nowhere_is_told(broker: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "penstock.nats"):
        await broker.reply([message("_OTHER.inbox")])
    assert "inbox_prefix" in caplog.text


# -- the end


async def test_a_line_that_comes_after_the_end_is_closed(node: NatsNode, space: str) -> None:
    async with Tap(node.port) as tap:
        broker: Any = NatsBroker(node.url(space, tap.port))
        await broker.open()
        await broker.declare(Queue("work"))
        await disconnect(broker)
        tap.open.clear()
        before = tap.waiting
        publishing = asyncio.create_task(broker.publish([message("work")]))
        await eventually(lambda: tap.waiting > before)
        await broker.close()
        tap.open.set()
        with pytest.raises(BrokerUnavailable):
            await publishing
        assert broker.link.current is None


async def test_looking_beside_a_publish_that_fails_ends_with_it(
    system: System, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await system.declare(broker, "work")
    await system.publish(broker, [message("work")])
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def fails(*_: object) -> None:
        raise BrokerUnavailable("no answer in time")

    monkeypatch.setattr(broker.bindings, "is_fresh", lambda topic: False)
    monkeypatch.setattr(broker.bindings, "look_up", lambda *_: never)
    monkeypatch.setattr(broker.publisher, "send", fails)
    with pytest.raises(BrokerUnavailable):
        await broker.publish([message("work")])
    assert never.cancelled()


async def test_browsing_finds_everything_around_holes(system: System, broker: Any, client: Any, space: str) -> None:
    await system.declare(broker, "work")
    sent = await system.publish(broker, messages("work", 100))
    stream = names.Names(space).stream("work")
    for seq in (1, 2, 40, 41, 100):
        await client.jsm().delete_msg(stream, seq)
    expected = [id for number, id in enumerate(sent, 1) if number not in (1, 2, 40, 41, 100)]
    written = written_by(broker)
    found, after = await system.admin(broker).browse("work", 1000)
    assert ids(found) == expected
    assert after is None
    assert len(written) > 50
    paged: list[str] = []
    position: Any = None
    while True:
        page, position = await system.admin(broker).browse("work", 7, position)
        assert len(page) <= 7
        paged += ids(page)
        if position is None:
            break
    assert paged == expected
