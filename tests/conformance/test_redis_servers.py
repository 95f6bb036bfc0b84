"""Redis servers: their addresses, the rights they give, and those that will not do; one clear line for each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from penstock.brokers import registry
from penstock.brokers.base import Move, Queue, Release
from penstock.brokers.redis import RedisBroker
from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable, ConfigError
from penstock.redis.address import parse_address
from penstock.redis.errors import Reply, translate
from penstock.stores import registry as stores
from penstock.testing.conformance.harness import Harness, System, ids, message, messages
from penstock.testing.faults import RedisNode
from penstock.testing.faults.ports import free_ports
from tests.helpers import eventually
from tests.servers import require

pytestmark = pytest.mark.blocks  # servers of our own are started and asked


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RedisNode]:
    require("redis")
    with RedisNode(tmp_path / "redis") as node:
        yield node


@pytest_asyncio.fixture
async def system(redis_url: str) -> AsyncIterator[System]:
    system = System(Harness(connect=lambda: RedisBroker(redis_url)))
    yield system
    await system.close()


@pytest_asyncio.fixture
async def broker(system: System) -> RedisBroker:
    broker = await system.connect()
    assert isinstance(broker, RedisBroker)
    return broker


async def refusal(url: str, error: type[BrokerError] = BrokerRefused) -> str:
    """What both, broker and store, say of a server."""
    said = set()
    for connect in (registry.connect, stores.connect):
        one = connect(url)
        with pytest.raises(error) as caught:
            await one.open()
        await one.close()
        said.add(str(caught.value))
    [text] = said
    assert "\n" not in text
    return text


# -- addresses


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("redis://", {"host": "127.0.0.1", "port": 6379, "database": 0, "namespace": ""}),
        ("redis://h:1/7?vhost=a", {"host": "h", "port": 1, "database": 7, "namespace": "a"}),
        ("redis://:pass%2F@h", {"user": None, "password": "pass/"}),
        ("redis://u:p@h/", {"user": "u", "password": "p", "tls": None}),
        ("rediss://h?ssl_cert_reqs=none", {"tls": {"ssl_cert_reqs": "none"}}),
        ("redis+unix:///run/r.sock?db=3", {"path": "/run/r.sock", "database": 3}),
        ("unix:///run/r.sock", {"path": "/run/r.sock", "database": 0}),
    ],
)
def test_addresses(url: str, fields: dict[str, Any]) -> None:
    address = parse_address(url)
    assert {name: getattr(address, name) for name in fields} == fields


@pytest.mark.parametrize(
    "url",
    [
        "redis://h/orders",
        "redis://h/1?db=2",
        "redis://h?vhsot=a",
        "redis://h?timeout=0",
        "redis://h?timeout=soon",
        "redis://h?ssl_cert_reqs=none",
        "rediss://h?ssl_cert_reqs=perhaps",
        "unix://run/r.sock",
        "redis+unix://",
    ],
)
def test_an_address_that_makes_no_sense_is_refused(url: str) -> None:
    for connect in (registry.connect, stores.connect):
        with pytest.raises(ConfigError) as caught:
            connect(url)
        assert "\n" not in str(caught.value)


def test_the_keys_of_a_namespace_are_on_one_node_of_a_cluster() -> None:
    for vhost in ("", "a", "a}b", "ключ {x}"):
        prefix = parse_address("redis://", vhost).prefix("penstock")
        tag = prefix[prefix.index("{") + 1 : prefix.index("}")]
        assert tag
        assert prefix == f"{{{tag}}}:"
    one, other = (parse_address(f"redis://h/{database}") for database in (0, 1))
    assert one.prefix("penstock") == other.prefix("penstock")
    assert one.channels("penstock") != other.channels("penstock")


async def test_a_socket_is_as_good_as_a_port(tmp_path: Path) -> None:
    require("redis")
    with RedisNode(tmp_path / "redis", unixsocket="r.sock") as node:
        system = System(Harness(connect=lambda: registry.connect(f"redis+unix://{node.folder}/r.sock?db=1")))
        broker = await system.connect()
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 2))
        assert ids(await system.drain(system.consume(broker, queue))) == sent
        await system.close()


async def test_two_namespaces_and_two_databases_are_four_systems(node: RedisNode) -> None:
    urls = [f"redis://127.0.0.1:{node.port}/{database}?vhost={vhost}" for database in (0, 1) for vhost in ("a", "b")]
    brokers = [RedisBroker(url) for url in urls]
    inboxes = [broker.inbox() for broker in brokers]
    for broker, inbox in zip(brokers, inboxes, strict=True):
        await broker.declare(Queue("work"))
        await inbox.listen(frozenset({"news"}))
    await brokers[0].publish([message("work")])
    await brokers[0].broadcast(message("news"))
    assert [[info.ready for info in await broker.admin.inspect()] for broker in brokers] == [[1], [0], [0], [0]]
    assert [len(await inbox.receive(0.1)) for inbox in inboxes] == [1, 0, 0, 0]
    for broker in brokers:
        await broker.close()


# -- servers that will not do


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid"])
async def test_a_server_that_cannot_be_reached_is_unavailable(address: str) -> None:
    assert address in await refusal(f"redis://{address}/", BrokerUnavailable)
    assert "/none.sock" in await refusal("unix:///none.sock", BrokerUnavailable)


async def test_a_server_that_says_nothing_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}?timeout=0.2"
        assert "has not answered for 0.2 s" in await refusal(url, BrokerUnavailable)


async def test_what_is_no_redis_is_refused() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert "does not speak Redis's protocol" in await refusal(f"redis://127.0.0.1:{port}")


async def test_a_database_that_there_is_not_is_refused(node: RedisNode) -> None:
    assert "has no such database" in await refusal(f"redis://127.0.0.1:{node.port}/99")


async def test_passwords(tmp_path: Path) -> None:
    require("redis")
    with RedisNode(tmp_path / "redis", requirepass="right", user=["narrow", "on", ">pw", "~other*", "+@all"]) as node:
        at = f"127.0.0.1:{node.port}/0"
        assert "wants a password" in await refusal(f"redis://{at}")
        said = await refusal(f"redis://:wrong@{at}")
        assert "refuses this user or password" in said
        assert "wrong" not in said.replace("refuses this user or password (WRONGPASS", "")[:40]
        await refusal(f"redis://nobody:right@{at}")
        broker = RedisBroker(f"redis://:right@{at}")
        await broker.declare(Queue("work"))
        await broker.close()


async def test_rights_that_are_missing_are_named(tmp_path: Path) -> None:
    require("redis")
    users = ["narrow", "on", ">pw", "~other*", "&*", "+@all"]
    with RedisNode(tmp_path / "redis", user=users) as node:
        broker = RedisBroker(f"redis://narrow:pw@127.0.0.1:{node.port}/0")
        with pytest.raises(BrokerRefused, match="does not let this user do that") as caught:
            await broker.declare(Queue("work"))
        assert "\n" not in str(caught.value)
        await broker.close()


async def test_who_may_not_listen_keeps_nobody_else_from_it(tmp_path: Path) -> None:
    require("redis")
    users = ["narrow", "on", ">pw", "~*", "&*wake*", "+@all"]
    with RedisNode(tmp_path / "redis", user=users) as node:
        system = System(Harness(connect=lambda: RedisBroker(f"redis://narrow:pw@127.0.0.1:{node.port}/0")))
        broker = await system.connect()
        queue = await system.declare(broker, "work")
        with pytest.raises(BrokerRefused, match="does not let this user do that"):
            await broker.inbox().listen(frozenset({"news"}))
        subscription = system.consume(broker, queue)
        receiving = await system.blocked(subscription)
        sent = await system.publish(broker, messages("work", 1))
        assert ids(await system.woken(receiving)) == sent
        await system.close()


async def test_the_rights_that_the_documentation_names_are_enough(tmp_path: Path) -> None:
    require("redis")
    rights = "~{penstock* &{penstock* -@all +@read +@write +@pubsub +@scripting +@connection -@dangerous +time"
    with RedisNode(tmp_path / "redis", user=["worker", "on", ">pw", *rights.split()]) as node:
        url = f"redis://worker:pw@127.0.0.1:{node.port}/0"
        system = System(Harness(connect=lambda: RedisBroker(url)))
        broker = await system.connect()
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 2))
        subscription = system.consume(broker, queue)
        [one, two] = await system.take(subscription, 2)
        await subscription.settle([Release(one, 0.05), Move(two, "work", message("work", id=two.id))])
        assert sorted(ids(await system.drain(subscription))) == sorted(sent)
        assert [info.ready for info in await system.admin(broker).inspect()] == [0]
        await system.close()


async def test_a_replica_is_unavailable_and_may_heal(node: RedisNode, tmp_path: Path) -> None:
    with RedisNode(tmp_path / "replica", replicaof=["127.0.0.1", str(node.port)]) as replica:
        assert "read-only replica" in await refusal(replica.url(), BrokerUnavailable)
        replica.ask("REPLICAOF", "NO", "ONE")
        broker = RedisBroker(replica.url())
        await broker.declare(Queue("work"))
        replica.ask("REPLICAOF", "127.0.0.1", str(node.port))
        with pytest.raises(BrokerUnavailable, match="read-only replica"):
            await broker.publish([message("work")])
        replica.ask("REPLICAOF", "NO", "ONE")

        async def healed() -> bool:
            try:
                await broker.declare(Queue("work"))
            except BrokerUnavailable:
                return False
            return True

        await eventually(healed)
        await broker.close()


async def test_a_server_that_may_evict_queues_is_refused_unless_one_asks_for_it(tmp_path: Path) -> None:
    require("redis")
    with RedisNode(tmp_path / "redis", maxmemory="100mb", maxmemory_policy="allkeys-lru") as node:
        said = await refusal(node.url())
        assert "allkeys-lru" in said
        assert "noeviction" in said
        broker = RedisBroker(node.url(evictable="true"))
        await broker.open()
        await broker.close()


async def test_a_server_that_keeps_nothing_is_warned_of_once_by_who_declares(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    require("redis")
    with RedisNode(tmp_path / "redis", appendonly="no") as node, caplog.at_level(logging.WARNING):
        broker = RedisBroker(node.url())
        await broker.open()
        assert broker.admin is not None
        await broker.admin.inspect()
        await broker.close()
        assert caplog.records == []
        for _ in range(2):
            broker = RedisBroker(node.url())
            await broker.open()
            await broker.declare(Queue("work"))
            await broker.close()
        assert [record.message for record in caplog.records] == [
            f"Redis at 127.0.0.1:{node.port} keeps nothing over its own death: appendonly is off"
        ]


async def test_an_old_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                writer.write(b"*4\r\n$7\r\nversion\r\n$5\r\n6.0.9\r\n$4\r\nrole\r\n$6\r\nmaster\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        said = await refusal(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        assert "too old: 6.0.9" in said


async def test_too_many_connections_are_unavailable(tmp_path: Path) -> None:
    require("redis")
    with RedisNode(tmp_path / "redis", maxclients=2) as node:
        brokers = [RedisBroker(node.url()) for _ in range(2)]
        for broker in brokers:
            await broker.open()
        with pytest.raises(BrokerUnavailable) as caught:
            await RedisBroker(node.url()).open()
        assert "\n" not in str(caught.value)
        for broker in brokers:
            await broker.close()


async def test_somebody_elses_keys_under_our_names_are_refused(broker: RedisBroker) -> None:
    await broker.link.call("SET", f"{broker.prefix}queues", "theirs")
    with pytest.raises(BrokerRefused, match="something else under a key of ours"):
        await broker.declare(Queue("work"))


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", BrokerUnavailable),
        ("ERR Error running script (call to f_1): @user_script:5: -OOM command not allowed", BrokerUnavailable),
        ("MISCONF Errors writing to the AOF file: No space left on device", BrokerUnavailable),
        ("LOADING Redis is loading the dataset in memory", BrokerUnavailable),
        ("CLUSTERDOWN The cluster is down", BrokerUnavailable),
        ("ERR max number of clients reached", BrokerUnavailable),
        ("ERR SELECT is not allowed in cluster mode", BrokerRefused),
        ("ERR unknown command 'XADD', with args beginning with:", BrokerRefused),
        ("ERR something\nnew", BrokerError),
    ],
)
def test_what_a_server_says_is_one_line_of_ours(said: str, error: type[BrokerError]) -> None:
    translated = translate(Reply(said), "h:1")
    assert isinstance(translated, error)
    assert "\n" not in str(translated)
    assert "h:1" in str(translated)


def test_what_a_script_met_is_what_it_is() -> None:
    """Redis 6 wraps it."""
    reply = Reply(
        "ERR Error running script (call to f_1): @user_script:5: -READONLY You can't write against a replica."
    )
    assert reply.code == "READONLY"
    assert Reply("NOSCRIPT No matching script.").code == "NOSCRIPT"


async def test_the_nodes_of_a_cluster_that_are_known_are_tried_in_turn(tmp_path: Path) -> None:
    require("redis")
    with RedisNode(tmp_path / "named") as named, RedisNode(tmp_path / "other") as other:
        broker = RedisBroker(named.url())
        broker.link._follow(f"MOVED 1 127.0.0.1:{other.port}", await broker.link.line())
        await broker.declare(Queue("work"))
        inbox = broker.inbox()
        await inbox.listen(frozenset({"news"}))
        named.kill()
        other.kill()
        for _ in range(3):
            with pytest.raises(BrokerUnavailable):
                await broker.declare(Queue("work"))
        other.start()

        async def back() -> bool:
            with contextlib.suppress(BrokerUnavailable):
                await broker.declare(Queue("work"))
                await inbox.listen(frozenset({"news"}))
                return broker.listening.up
            return False

        await eventually(back)
        assert broker.link.address.port == other.port
        await broker.close()


# -- TLS


async def test_tls_looks_at_the_certificate(tmp_path: Path) -> None:
    require("redis")
    made, key = tmp_path / "server.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=penstock-test",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", made],
        check=True, capture_output=True,
    )  # fmt: skip
    [port] = free_ports(1)
    settings: dict[str, Any] = {"tls_port": port, "tls_cert_file": made, "tls_key_file": key, "tls_ca_cert_file": made}
    with RedisNode(tmp_path / "redis", tls_auth_clients="no", **settings):
        at = f"rediss://127.0.0.1:{port}/0"
        assert "certificate not to be trusted" in await refusal(at)
        assert "cannot be read: No such file" in await refusal(f"{at}?ssl_ca_certs=/does/not/exist")
        for options in (f"ssl_ca_certs={made}", "ssl_cert_reqs=none"):
            system = System(Harness(connect=lambda options=options: RedisBroker(f"{at}?{options}")))  # type: ignore[misc]
            broker = await system.connect()
            queue = await system.declare(broker, "work")
            sent = await system.publish(broker, [message("work", bytes(300_000))])
            assert ids(await system.drain(system.consume(broker, queue))) == sent
            await system.close()
