"""What is NATS's own: addresses, rights and limits, streams of others, foreign messages, what is sent twice."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import nats
import pytest
import pytest_asyncio
from nats.aio.transport import TcpTransport
from nats.js.api import RetentionPolicy, StreamConfig

from penstock.brokers import registry
from penstock.brokers.base import Broker, Move, Queue, Release
from penstock.brokers.nats import NatsBroker, names, wire
from penstock.brokers.nats.api import Api, Refusal, as_ours
from penstock.errors import (
    BodyTooLarge,
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    ConfigError,
    PublishError,
    QueueMismatch,
    StorageFull,
    Unroutable,
)
from penstock.message import Delivery
from penstock.testing.conformance.harness import Harness, System, acks, ids, message, messages
from penstock.testing.faults import NatsNode, Proxy
from tests.helpers import eventually
from tests.servers import require


@pytest_asyncio.fixture
async def system(nats_url: str) -> AsyncIterator[System]:
    system = System(Harness(connect=lambda: NatsBroker(nats_url), lease=1.5, quiet=0.15))
    yield system
    await system.close()


@pytest_asyncio.fixture
async def broker(system: System) -> Broker:
    return await system.connect()


@contextmanager
def server(folder: Path, config: str = "", jetstream: bool = True) -> Iterator[NatsNode]:
    require("nats")
    with NatsNode(folder, config=config, jetstream=jetstream) as node:
        yield node


async def refusal(url: str, error: type[BrokerError] = BrokerRefused) -> str:
    broker = registry.connect(url)
    with pytest.raises(error) as caught:
        await broker.open()
    await broker.close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- addresses


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid"])
async def test_a_server_that_cannot_be_reached_is_unavailable(address: str) -> None:
    assert address in await refusal(f"nats://{address}/", BrokerUnavailable)


async def test_a_server_that_says_nothing_is_unavailable() -> None:
    with Proxy(4222) as proxy:
        proxy.swallow()
        assert "no answer in time" in await refusal(f"nats://127.0.0.1:{proxy.port}/?timeout=0.2", BrokerUnavailable)


async def test_a_server_that_greets_nobody_does_not_keep_us_from_the_others(nats_url: str) -> None:
    address, _, space = nats_url.rpartition("/")
    with Proxy(4222) as proxy:
        proxy.swallow()
        broker = NatsBroker(f"nats://127.0.0.1:{proxy.port}/{space}?timeout=0.3&servers={address[7:]}")
        await broker.open()
        await broker.close()


async def test_a_server_that_cannot_be_worked_with_does_not_keep_us_from_the_others(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is cut off from its cluster: it greets us, and JetStream does not answer."""
    address, _, space = nats_url.rpartition("/")
    check, asked = Api.check, list[Api]()

    async def once(api: Api) -> None:
        asked.append(api)
        if len(asked) == 1:
            raise BrokerUnavailable("JetStream: JetStream system temporarily unavailable (10008)")
        await check(api)

    monkeypatch.setattr(Api, "check", once)
    with Proxy(4222) as proxy:
        broker = NatsBroker(f"nats://127.0.0.1:{proxy.port}/{space}?servers={address[7:]}")
        await broker.open()
        assert len(asked) == 2
        proxy.swallow()  # who had us last is tried first no more
        await broker.declare(Queue("work"))
        await broker.close()


async def test_who_cannot_wait_for_a_line_does_not_keep_the_next_one_from_it(nats_url: str) -> None:
    address, _, space = nats_url.rpartition("/")
    with Proxy(4222) as proxy:
        proxy.swallow()
        broker = NatsBroker(f"nats://127.0.0.1:{proxy.port}/{space}?timeout=0.5&servers={address[7:]}")

        async def opens() -> bool:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await broker.open()
            return broker.link.current is not None

        await eventually(opens)
        assert proxy.accepted == 1
        await broker.close()


async def test_who_closes_waits_for_no_line_and_leaves_nothing_behind() -> None:
    before = asyncio.all_tasks()
    with Proxy(4222) as proxy:
        proxy.swallow()
        broker = NatsBroker(f"nats://127.0.0.1:{proxy.port}/")
        waiting = [asyncio.create_task(broker.open()) for _ in range(2)]
        await eventually(lambda: proxy.accepted)
        waiting[0].cancel()
        await broker.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        with pytest.raises(BrokerUnavailable, match="closed meanwhile"):
            await waiting[1]
    assert asyncio.all_tasks() <= before


async def test_a_server_out_of_reach_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver would try it once more."""
    tried = list[object]()

    async def connect(transport: TcpTransport, uri: object, buffer_size: int, connect_timeout: float) -> None:
        tried.append(uri)
        async with asyncio.timeout(connect_timeout):
            await asyncio.Event().wait()

    monkeypatch.setattr(TcpTransport, "connect", connect)
    assert "no answer in time" in await refusal("nats://127.0.0.1:1/?timeout=0.2", BrokerUnavailable)
    assert len(tried) == 1


@pytest.mark.blocks
async def test_a_server_that_refuses_does_not_keep_us_from_the_others(tmp_path: Path, nats_url: str) -> None:
    address, _, space = nats_url.rpartition("/")
    with server(tmp_path, "authorization { token: s3cr3t }") as node:
        at = f"127.0.0.1:{node.port}"
        broker = NatsBroker(f"nats://{at}/{space}?servers={address[7:]}")
        await broker.open()
        await broker.close()
        said = await refusal(f"nats://{at}/?servers=localhost:{node.port}")
        assert said.count("refuses the login") == 2
        assert "refuses the login" in await refusal(f"nats://{at}/?servers=127.0.0.1:1", BrokerUnavailable)


@pytest.mark.blocks
async def test_a_server_that_was_only_told_of_and_refuses_is_no_refusal(tmp_path: Path) -> None:
    with server(tmp_path, "authorization { token: s3cr3t }") as node:
        for url, told, error in (
            ("nats://127.0.0.1:1/", f"nats://127.0.0.1:{node.port}", BrokerUnavailable),
            (node.url(), "nats://127.0.0.1:1", BrokerRefused),
        ):
            broker = NatsBroker(url)
            broker.link._discovered = [told]
            with pytest.raises(error, match="refuses the login"):
                await broker.open()
            await broker.close()


async def test_what_is_wrong_with_our_own_files_is_told_before_any_server_is_asked() -> None:
    """Though another one cannot be reached, which alone would be tried again."""
    with Proxy(4222) as proxy:
        url = f"nats://127.0.0.1:{proxy.port}/?servers=127.0.0.1:1"
        for option in ("creds", "nkeys_seed", "cafile"):
            assert "No such file" in await refusal(f"{url}&{option}=/does/not/exist")
        assert proxy.accepted == 0


async def test_servers_that_join_the_cluster_later_are_used(nats_url: str) -> None:
    """A real server behind a proxy that dies, and what that server would say of another one."""
    address, _, space = nats_url.rpartition("/")
    with Proxy(4222) as proxy:
        broker = NatsBroker(f"nats://127.0.0.1:{proxy.port}/{space}?timeout=2")
        broker.link._discovered = [f"nats://127.0.0.1:{number}" for number in range(1, 41)]
        await broker.open()
        line = broker.link.current
        assert line is not None
        await line._client._process_info({"connect_urls": [address[7:]]})
    await eventually(lambda: line.closed)
    await broker.open()
    assert broker.link._last == address
    assert len(broker.link._discovered) == 32
    assert f"nats://127.0.0.1:{1}" in broker.link._discovered
    await broker.close()


async def test_what_each_server_said_is_told_in_one_line() -> None:
    said = await refusal("nats://127.0.0.1:1/space?servers=127.0.0.1:2,[::1]:3", BrokerUnavailable)
    assert re.fullmatch(r"nats://127.0.0.1:1/space: .+; nats://127.0.0.1:2: .+; nats://\[::1\]:3: .+", said)
    assert "Errno" in await refusal("nats://[::1]:1/", BrokerUnavailable)


@pytest.mark.parametrize("number", [503, 10004, 10005, 10008, 10009, 10118, 10119])
def test_what_a_cluster_cannot_do_now_is_no_refusal(number: int) -> None:
    assert isinstance(as_ours(Refusal(number, "stream is offline"), "publishing"), BrokerUnavailable)


async def test_a_missing_certificate_file_is_refused() -> None:
    assert "No such file" in await refusal("tls://127.0.0.1:4222/?cafile=/does/not/exist")


@pytest.mark.parametrize(
    "rest",
    [
        *("a/b", "white space", "x" * 41, "?replicas=0", "?replicas=three", "?dedupe=1", "?timeout=0", "?keyfile=k"),
        *("?servers=nats://b:1", "?servers=b:1,me:sesame@c:1", "?servers=b:1/space"),
    ],
)
def test_an_address_that_makes_no_sense_is_refused(rest: str) -> None:
    with pytest.raises(ConfigError):
        NatsBroker(f"nats://127.0.0.1/{rest}")


@pytest.mark.blocks
async def test_wrong_credentials_are_refused_and_not_shown(tmp_path: Path) -> None:
    with server(tmp_path, 'authorization { user: "me", password: "sesame" }') as node:
        said = await refusal(node.url(login="me:wr%2Fong"))
        assert "refuses the login" in said
        assert "wr/ong" not in said
        assert "wr%2Fong" not in said
        assert "refuses the login" in await refusal(node.url())
        broker = registry.connect(node.url(login="me:sesame"))
        await broker.open()
        await broker.close()


@pytest.mark.blocks
async def test_a_token_is_a_login(tmp_path: Path) -> None:
    with server(tmp_path, 'authorization { token: "s3cr3t" }') as node:
        for url in (node.url(login="s3cr3t"), node.url(token="s3cr3t")):
            broker = registry.connect(url)
            await broker.open()
            await broker.close()
        said = await refusal(node.url(token="other"))
        assert "refuses the login" in said
        assert "other" not in said


@pytest.mark.blocks
async def test_a_server_without_jetstream_is_refused(tmp_path: Path) -> None:
    with server(tmp_path, jetstream=False) as node:
        assert "start it with -js" in await refusal(node.url())


@pytest.mark.blocks
async def test_a_server_that_has_no_jetstream_yet_is_waited_for(tmp_path: Path) -> None:
    """A real server, and another in its place that has not, as it is for a moment when one begins."""
    with server(tmp_path) as node:
        broker = NatsBroker(node.url())
        await broker.open()
        await broker.declare(queue := Queue("work"))
        subscription = broker.subscribe([queue], prefetch=1, lease=30, on_lost=lambda _: None)
        node.stop()
        config = tmp_path / "nats.conf"
        whole = config.read_text()
        config.write_text(f"listen: 127.0.0.1:{node.port}\n")
        node.start()
        await eventually(lambda: broker.link.current is None)
        for _ in range(2):
            with pytest.raises(BrokerUnavailable, match="JetStream is not there now"):
                await broker.publish([message("work")])
        assert "start it with -js" in await refusal(node.url())  # to whoever has never seen it there
        node.stop()
        config.write_text(whole)
        node.start()
        assert list(await broker.publish([message("work")])) == [None]
        assert len(await subscription.receive(1, 5)) == 1
        await broker.close()


@pytest.mark.blocks
async def test_jetstream_that_goes_from_under_a_line_is_waited_for(tmp_path: Path) -> None:
    """A real server, whose JetStream a reload takes from us and gives back, as it is for a moment when one ends."""
    config = f"""jetstream {{ store_dir: "{tmp_path / "data"}" }}
        accounts {{ ours: {{ jetstream: enabled, users: [{{ user: me, password: x }}] }} }}"""
    with server(tmp_path, config) as node:
        broker = NatsBroker(node.url(login="me:x"))
        await broker.open()
        line = broker.link.current

        async def declared() -> str:
            try:
                await broker.declare(Queue("work"))
            except BrokerUnavailable as error:
                return str(error)
            return "declared"

        async def reload(word: str, outcome: str) -> None:
            written = tmp_path / "nats.conf"
            written.write_text(re.sub("enabled|disabled", word, written.read_text()))
            assert node.pid is not None
            os.kill(node.pid, signal.SIGHUP)

            async def has_come() -> bool:
                return await declared() == outcome

            await eventually(has_come)

        await reload("disabled", "JetStream is not there now")
        await reload("enabled", "declared")
        assert broker.link.current is line
        await broker.close()


@pytest.mark.blocks
async def test_a_server_with_as_many_connections_as_it_may_have_is_unavailable(tmp_path: Path) -> None:
    with server(tmp_path, "max_connections: 1") as node:
        first = registry.connect(node.url())

        async def opens() -> bool:
            with suppress(BrokerUnavailable):  # whoever looked whether the server is up may still be counted
                await first.open()
                return True
            return False

        await eventually(opens)
        for _ in range(50):  # it closes before it is spoken to, or after, and its reason is never lost
            assert "as many connections" in await refusal(node.url(), BrokerUnavailable)
        await first.close()
        await eventually_opens(node.url())


@pytest.mark.blocks
async def test_a_server_with_as_many_connections_says_so_before_tls_begins(tmp_path: Path) -> None:
    made, key = tmp_path / "server.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=penstock-test",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", made],
        check=True, capture_output=True,
    )  # fmt: skip
    config = f'max_connections: 1, tls {{ cert_file: "{made}", key_file: "{key}" }}'
    with server(tmp_path, config) as node:
        url = node.url(cafile=made).replace("nats:", "tls:")
        await eventually_opens(url)
        first = NatsBroker(url)

        async def opens() -> bool:
            with suppress(BrokerUnavailable):
                await first.open()
            return first.link.current is not None

        await eventually(opens)
        for _ in range(8):
            assert "as many connections" in await refusal(url, BrokerUnavailable)
        await first.close()


@pytest.mark.blocks
async def test_a_server_that_others_tell_of_by_its_number_has_a_certificate_by_name(tmp_path: Path) -> None:
    made, key = tmp_path / "server.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=penstock-test",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", made],
        check=True, capture_output=True,
    )  # fmt: skip
    with server(tmp_path, f'tls {{ cert_file: "{made}", key_file: "{key}" }}') as node:
        broker = NatsBroker(f"tls://localhost:1/?cafile={made}")
        broker.link._discovered = [f"tls://127.0.0.1:{node.port}"]
        await broker.open()
        await broker.close()
        await broker.open()  # again, where no other has told of it
        await broker.close()
        assert "verify failed" in await refusal(f"tls://127.0.0.1:{node.port}/?cafile={made}")


async def eventually_opens(url: str) -> None:
    async def opens() -> bool:
        broker = registry.connect(url)
        try:
            await broker.open()
        except BrokerUnavailable:
            return False
        finally:
            await broker.close()
        return True

    await eventually(opens)


RIGHTS = """
authorization {{ users: [ {{ user: "boss", password: "x" }},
  {{ user: "me", password: "x", permissions: {{ publish: {publish}, subscribe: {subscribe} }} }} ] }}
"""


@pytest.mark.blocks
@pytest.mark.parametrize(
    ("publish", "subscribe", "missing"),
    [
        ('["$JS.API.>"]', '["_INBOX.>"]', "penstock.bind"),
        ('["_INBOX.>"]', '[">"]', "$js.api.info"),
        ('[">"]', '["other.>"]', "_inbox"),
    ],
)
async def test_a_missing_right_is_named_at_once(tmp_path: Path, publish: str, subscribe: str, missing: str) -> None:
    with server(tmp_path, RIGHTS.format(publish=publish, subscribe=subscribe)) as node:
        began = time.monotonic()
        said = await refusal(node.url(login="me:x", timeout=3), BrokerError)
        assert "permissions violation" in said or "no answer in time" in said
        if "permissions" in said:
            assert missing in said
            assert time.monotonic() - began < 2


@pytest.mark.blocks
async def test_a_queue_that_one_may_not_publish_to_is_an_error_of_its_messages(tmp_path: Path) -> None:
    rights = RIGHTS.format(publish='{ deny: ["penstock.q.secret.>"] }', subscribe='[">"]')
    with server(tmp_path, rights) as node:
        broker = registry.connect(node.url(login="me:x"))
        await broker.open()
        for name in ("secret", "open"):
            await broker.declare(Queue(name))
        began = time.monotonic()
        outcomes = await broker.publish([message("secret"), message("open")])
        assert isinstance(outcomes[0], PublishError)
        assert "lacks a right" in str(outcomes[0])
        assert outcomes[1] is None
        assert time.monotonic() - began < 3
        await broker.close()


@pytest.mark.blocks
async def test_what_is_there_is_used_without_the_right_to_make_it(tmp_path: Path) -> None:
    """Nor is whoever leads a cluster needed for that, who may have died."""
    rights = RIGHTS.format(publish='{ deny: ["$JS.API.STREAM.CREATE.>"] }', subscribe='[">"]')
    with server(tmp_path, rights) as node:
        boss = NatsBroker(node.url(login="boss:x"))
        await boss.open()
        await boss.declare(queue := Queue("work"))
        broker = NatsBroker(node.url(login="me:x"))
        await broker.open()
        await broker.declare(queue)
        assert list(await broker.publish([message("work")])) == [None]
        for one in (boss, broker):
            await one.close()


@pytest.mark.blocks
async def test_a_store_at_its_limit_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    with server(tmp_path, f'jetstream {{ store_dir: "{tmp_path / "data"}", max_file_store: 3MB }}') as node:
        broker = registry.connect(node.url())
        await broker.open()
        await broker.declare(queue := Queue("work"))
        kept: list[str] = []
        for _ in range(10):
            [outcome] = await broker.publish([one := message("work", bytes(500_000))])
            if outcome is not None:
                break
            kept.append(one.id)
        assert isinstance(outcome, StorageFull)
        assert "\n" not in str(outcome)
        subscription = broker.subscribe([queue], prefetch=100, lease=30, on_lost=lambda _: None)
        taken: list[Delivery] = []
        while len(taken) < len(kept):
            taken += await subscription.receive(10, 5)
        assert ids(taken) == kept
        await subscription.settle(acks(taken))
        assert list(await broker.publish([message("work")])) == [None]
        await broker.close()


# -- what others made


async def test_a_stream_of_another_shape_with_our_name_is_a_mismatch(nats_url: str, broker: Broker) -> None:
    space = nats_url.rpartition("/")[2]
    client = await nats.connect(nats_url.rpartition("/")[0])
    stream = names.Names(space).stream("theirs")
    await client.jetstream().add_stream(StreamConfig(name=stream, subjects=[f"{space}.else"]))
    with pytest.raises(QueueMismatch) as caught:
        await broker.declare(Queue("theirs"))
    assert stream in str(caught.value)
    await client.close()


async def test_a_stream_that_takes_our_subjects_is_named(nats_url: str, broker: Broker) -> None:
    space = nats_url.rpartition("/")[2]
    client = await nats.connect(nats_url.rpartition("/")[0])
    await client.jetstream().add_stream(StreamConfig(name=f"{space}-theirs", subjects=[f"{space}.q.>"]))
    with pytest.raises(BrokerRefused) as caught:
        await broker.declare(Queue("work"))
    assert "takes our subjects" in str(caught.value)
    await client.close()


async def test_an_existing_queue_is_used_as_it_is(
    system: System, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    await system.declare(broker, "work", max_length=2)
    other = await system.connect()
    with caplog.at_level(logging.WARNING, "penstock"):
        for _ in range(2):
            await other.declare(Queue("work", max_length=5))
    assert len(caplog.records) == 1
    _, full = await system.fill(other, Queue("work", max_length=2))
    assert "limit of 2" in str(full)


async def test_a_foreign_message_has_a_lasting_id_and_its_headers(
    system: System, broker: Broker, nats_url: str
) -> None:
    queue = await system.declare(broker, "work")
    space = nats_url.rpartition("/")[2]
    client = await nats.connect(nats_url.rpartition("/")[0])
    await client.jetstream().publish(f"{space}.q.work.work", b"{}", headers={"Content-Type": "text/plain", "X": "1"})
    subscription = system.consume(broker, queue)
    [first] = await system.take(subscription)
    assert (first.topic, first.raw, first.headers) == ("work", b"{}", {"content-type": "text/plain", "X": "1"})
    await subscription.settle([Release(first)])
    [again] = await system.take(subscription)
    assert again.id == first.id != ""
    await client.close()


# -- names


@pytest.mark.parametrize("queue", [Queue(""), Queue("x" * 256), Queue("q", ("ö" * 128,))])
async def test_a_name_that_cannot_be_one_is_refused_and_nothing_is_made(
    system: System, broker: Broker, queue: Queue
) -> None:
    with pytest.raises(BrokerRefused):
        await broker.declare(queue)
    assert list(await system.admin(broker).inspect()) == []


async def test_names_as_long_as_can_be_work(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "ö" * 127, topics=("n" * 255,))
    sent = await system.publish(broker, [message("n" * 255), message(queue.name)])
    assert ids(await system.drain(system.consume(broker, queue))) == sent


async def test_nobody_can_be_bound_to_what_is_no_name(broker: Broker) -> None:
    outcomes = await broker.publish([message(""), message("x" * 256), message("\udce9")])
    assert [type(outcome) for outcome in outcomes] == [Unroutable] * 3


@pytest.mark.parametrize("name", ["plain-1_X", "a.b", "ключ 🚰", "=41", "*>", "x\ny"])
def test_a_token_stands_for_one_name(name: str) -> None:
    token = names.token(name)
    assert names.name_of(token) == name
    assert not set(token) & set(" .*>\r\n")


# -- what travels


async def test_a_message_over_the_servers_ceiling_is_refused_alone(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    outcomes = await broker.publish([message("work"), message("work", bytes(2**20)), message("work")])
    assert [type(outcome) for outcome in outcomes[::2]] == [type(None)] * 2
    assert isinstance(outcomes[1], BodyTooLarge)
    assert "max_payload" in str(outcomes[1])
    assert outcomes[1].size > 2**20 > outcomes[1].limit
    assert len(await system.take(system.consume(broker, queue), 2)) == 2


async def foreign(nats_url: str, size: int) -> None:
    """A message that somebody else publishes to the queue `work`, with no header."""
    address, _, space = nats_url.rpartition("/")
    client = await nats.connect(address)
    await client.jetstream().publish(f"{space}.q.work.work", bytes(size))
    await client.close()


async def test_what_is_too_large_to_be_a_dead_letter_becomes_one_without_its_headers(
    system: System, broker: Broker, nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    queue, dead = await system.declare(broker, "work"), await system.declare(broker, "work.dead")
    await foreign(nats_url, 2**20 - 500)
    subscription = system.consume(broker, queue)
    [held] = await system.take(subscription)
    headers = {"content-type": "text/plain", "penstock-dead": "y" * 1000}
    dying = msgspec.structs.replace(held.outgoing(), headers=headers)
    with caplog.at_level(logging.ERROR, "penstock.nats"):
        assert list(await subscription.settle([Move(held, "work.dead", dying)])) == []
    assert len(caplog.records) == 1
    assert "without its headers" in caplog.text
    [letter] = await system.take(system.consume(broker, dead))
    assert (letter.id, letter.raw, letter.headers) == (held.id, held.raw, {"content-type": "text/plain"})
    assert await system.drain(subscription) == []


async def test_what_is_too_large_to_be_published_again_is_tried_again_in_its_place(
    system: System, broker: Broker, nats_url: str
) -> None:
    queue = await system.declare(broker, "work")
    await foreign(nats_url, 2**20 - 200)
    subscription = system.consume(broker, queue)
    [held] = await system.take(subscription)
    again = msgspec.structs.replace(held.outgoing(), headers={"penstock-history": "x" * 200})
    assert list(await subscription.settle([Move(held, "work", again)])) == []
    [second] = await system.take(subscription)
    assert (second.id, second.headers, second.redelivered) == (held.id, {"penstock-history": "x" * 200}, 0)


async def test_what_fits_nowhere_is_said_once_and_put_off(
    system: System, broker: Broker, nats_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.brokers.nats import hand

    monkeypatch.setattr(hand, "LATER", 0.5)
    queue = await system.declare(broker, "work")
    await system.declare(broker, "work.dead")
    await foreign(nats_url, 2**20)
    subscription = system.consume(broker, queue)
    [held] = await system.take(subscription)
    with caplog.at_level(logging.ERROR, "penstock.nats"):
        assert list(await subscription.settle([Move(held, "work.dead", held.outgoing())])) == []
    assert len(caplog.records) == 1
    assert "max_payload" in caplog.text
    [again] = await system.take(subscription)
    assert (again.id, again.redelivered) == (held.id, 0)


@pytest.mark.parametrize("headers", [{"x": "y" * 70_000}, {"x": object()}, {"x": "\udce9"}])
async def test_headers_that_cannot_be_carried_are_refused(
    system: System, broker: Broker, headers: dict[str, object]
) -> None:
    await system.declare(broker, "work")
    [outcome] = await broker.publish([message("work", headers=headers)])
    assert isinstance(outcome, PublishError)


def test_places_of_older_and_newer_servers_are_read() -> None:
    assert wire.place_of(b"$JS.ACK.s.c.2.30.4.1700.5") == (2, "30", "1700")
    assert wire.place_of(b"$JS.ACK.hub.account.s.c.2.30.4.1700.5") == (2, "30", "1700")
    assert wire.place_of(b"$JS.ACK.hub.account.s.c.2.30.4.1700.5.random") == (2, "30", "1700")


async def test_a_reply_goes_to_inboxes_only(broker: Broker, nats_url: str) -> None:
    client = await nats.connect(nats_url.rpartition("/")[0])
    heard = await client.subscribe("$JS.API.STREAM.DELETE.*")
    await client.flush()
    await broker.reply([message("$JS.API.STREAM.DELETE.precious"), message("_INBOX.a b"), message("_INBOX.x\r\nPING")])
    with pytest.raises(nats.errors.TimeoutError):
        await heard.next_msg(0.2)
    await client.close()


# -- what is sent twice


async def test_sent_twice_is_kept_twice_unless_asked_otherwise(system: System, broker: Broker, nats_url: str) -> None:
    queue = await system.declare(broker, "work", topics=("news",))
    other = NatsBroker(f"{nats_url}?dedup=true")
    await other.open()
    for _ in range(2):
        assert list(await broker.publish([message("work", id="twice")])) == [None]
        assert list(await other.publish([message("work", id="once"), message("news", id="once")])) == [None, None]
    assert sorted(ids(await system.drain(system.consume(broker, queue)))) == ["once", "twice", "twice"]
    await other.close()


async def test_a_move_that_is_tried_again_after_a_doubt_is_stored_once(
    system: System, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.brokers.nats import hand

    queue = await system.declare(broker, "work")
    dead = await system.declare(broker, "work.dead")
    await system.publish(broker, messages("work", 1))
    subscription = system.consume(broker, queue)
    [held] = await system.take(subscription)
    say = hand.say

    async def unheard(*_: object) -> None:
        raise BrokerUnavailable("no answer in time")

    monkeypatch.setattr(hand, "say", unheard)
    with pytest.raises(BrokerUnavailable):
        await subscription.settle([Move(held, "work.dead", held.outgoing())])
    monkeypatch.setattr(hand, "say", say)
    assert list(await subscription.settle([Move(held, "work.dead", held.outgoing())])) == []
    assert len(await system.drain(system.consume(broker, dead))) == 1


# -- lines and leases


async def test_what_is_held_survives_the_line(system: System, nats_url: str) -> None:
    with Proxy(4222) as proxy:
        broker = NatsBroker(nats_url.replace(":4222", f":{proxy.port}"))
        await broker.open()
        await broker.declare(queue := Queue("work"))
        await broker.publish(messages("work", 3))
        lost: list[object] = []
        subscription = broker.subscribe([queue], prefetch=10, lease=30, on_lost=lost.extend)
        held: list[Delivery] = []
        while len(held) < 3:
            held += await subscription.receive(3, 5)
        proxy.cut()
        await eventually(lambda: not subscription.consuming)
        assert list(await subscription.settle(acks(held))) == []
        assert await subscription.receive(10, 0.2) == []
        assert subscription.consuming
        assert not lost
        await broker.close()


async def test_a_deleted_queue_is_made_again_and_consumed(system: System, broker: Broker, nats_url: str) -> None:
    queue = await system.declare(broker, "work")
    receiving = await system.blocked(system.consume(broker, queue))
    space = nats_url.rpartition("/")[2]
    client = await nats.connect(nats_url.rpartition("/")[0])
    await client.jsm().delete_stream(names.Names(space).stream("work"))
    [gone] = await broker.publish([message("work")])
    assert gone is None or isinstance(gone, Unroutable)

    async def published() -> bool:
        return list(await broker.publish([message("work", id="after")])) == [None]

    await eventually(published)
    assert await system.woken(receiving)
    await client.close()


async def test_the_shortest_lease_is_kept_while_somebody_uses_the_queue(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    await system.publish(broker, messages("work", 2))
    short = system.consume(broker, queue, lease=2.0, prefetch=1)
    [held] = await system.take(short)
    long = system.consume(await system.connect(), queue, lease=60.0)
    await system.take(long)
    assert {source.ack_wait for source in long._sources} == {2.0}  # type: ignore[attr-defined]
    await short.settle(acks([held]))
    await short.close()
    await long.close()
    again = system.consume(broker, queue, lease=60.0)
    await system.take(again)
    assert {source.ack_wait for source in again._sources} == {2.0}  # type: ignore[attr-defined]


async def test_messages_that_were_acknowledged_before_a_kill_are_removed(
    system: System, broker: Broker, nats_url: str
) -> None:
    """The stream's own consumer has done with them, and still they are there: as after a kill of the server."""
    queue = await system.declare(broker, "work")
    space = nats_url.rpartition("/")[2]
    client = await nats.connect(nats_url.rpartition("/")[0])
    manager = client.jsm()
    stream = names.Names(space).stream("work")
    await manager.delete_stream(stream)
    subjects = [names.Names(space).subjects("work")]
    await manager.add_stream(StreamConfig(name=stream, subjects=subjects, retention=RetentionPolicy.LIMITS))
    await system.publish(broker, messages("work", 5))
    subscription = system.consume(broker, queue)
    await subscription.settle(acks(await system.take(subscription, 5)))
    await subscription.close()
    assert (await manager.stream_info(stream)).state.messages == 5
    await system.silent(system.consume(broker, queue))
    assert (await manager.stream_info(stream)).state.messages == 0
    await client.close()


async def test_idle_consumers_ask_once_in_half_a_lease(system: System, broker: Broker) -> None:
    queue = await system.declare(broker, "work")
    subscription = system.consume(broker, queue, lease=20.0)
    receiving = await system.blocked(subscription)
    line = broker.link.current  # type: ignore[attr-defined]
    written: list[bytes] = []
    line._client.hand_over = written.append
    await asyncio.sleep(0.5)
    assert not written
    del line._client.hand_over
    receiving.cancel()
