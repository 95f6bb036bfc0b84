"""The tools of the fault tests do what they say: a line that is cut, silent or slow; a server of our own."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator

import pytest

from penstock.testing.faults import Ledger, Proxy, RabbitNode, seconds_until, wait_until
from tests.helpers import eventually

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(60)]


class Line:
    """A client's connection through the proxy to a server that says everything back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def through(cls, proxy: Proxy) -> Line:
        return cls(*await asyncio.open_connection("127.0.0.1", proxy.port))

    async def echo(self, data: bytes) -> float:
        """Seconds until all of it has come back."""
        began = time.monotonic()
        self.writer.write(data)
        assert await self.reader.readexactly(len(data)) == data
        return time.monotonic() - began

    async def broken(self, within: float = 5.0) -> bool:
        try:
            async with asyncio.timeout(within):
                return await self.reader.read(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def close(self) -> None:
        self.writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    async def say_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(say_back, "127.0.0.1", 0)
    async with Proxy(server.sockets[0].getsockname()[1]) as proxy:
        yield proxy
    server.close()


async def test_everything_passes_both_ways_and_connections_are_counted(proxy: Proxy) -> None:
    lines = [await Line.through(proxy) for _ in range(3)]
    data = os.urandom(1_000_000)
    assert await asyncio.gather(*(line.echo(data) for line in lines))
    assert (proxy.accepted, proxy.open, proxy.cuts) == (3, 3, 0)
    for line in lines:
        line.close()
    await eventually(lambda: proxy.open == 0)


async def test_a_cut_resets_every_connection_and_lets_new_ones_through(proxy: Proxy) -> None:
    lines = [await Line.through(proxy) for _ in range(3)]
    for line in lines:
        await line.echo(b"hello")
    assert proxy.cut() == 3
    assert all([await line.broken() for line in lines])
    await eventually(lambda: proxy.open == 0)
    line = await Line.through(proxy)
    await line.echo(b"again")
    line.close()


async def test_shortened_lives_end_old_and_new_connections_until_restored(proxy: Proxy) -> None:
    old = await Line.through(proxy)
    await old.echo(b"hello")
    proxy.shorten(0.05, 0.1)
    new = await Line.through(proxy)
    assert await old.broken()
    assert await new.broken()
    proxy.restore()
    line = await Line.through(proxy)
    assert not await line.broken(within=0.3)
    line.close()


async def test_a_swallowed_line_looks_open_and_is_silent_until_restored(proxy: Proxy) -> None:
    old = await Line.through(proxy)
    await old.echo(b"hello")
    proxy.swallow()
    new = await Line.through(proxy)
    for line in (old, new):
        line.writer.write(b"anybody there?")
        assert not await line.broken(within=0.2)
    proxy.restore()
    assert await old.broken(), "it lacks bytes and cannot go on"
    assert await new.broken()
    line = await Line.through(proxy)
    await line.echo(b"again")
    line.close()


async def test_delay_and_throttle_slow_a_line_until_restored(proxy: Proxy) -> None:
    line = await Line.through(proxy)
    proxy.delay(0.1)
    assert await line.echo(b"slowly") >= 0.2
    proxy.restore()
    proxy.throttle(100_000)
    assert await line.echo(bytes(20_000)) >= 0.2
    proxy.restore()
    assert await line.echo(bytes(20_000)) < 0.2
    line.close()


def test_the_proxy_serves_blocking_tests_too_and_is_gone_afterwards() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Proxy(server.getsockname()[1]) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port)) as client,
    ):
        client.sendall(b"hello")
        served, _ = server.accept()
        with served:
            assert served.recv(5) == b"hello"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port)).close()


def test_a_condition_that_never_comes_true_is_named() -> None:
    assert seconds_until(lambda: True, "now", 1) < 0.5
    with pytest.raises(TimeoutError, match=r"not within 0\.1 s: the moon"):
        wait_until(lambda: False, "the moon", 0.1)


def test_a_ledger_tells_what_was_started_and_not_finished(own_directory: object) -> None:
    ledger = Ledger("ledger")
    for event, id in (("started", "a"), ("started", "b"), ("finished", "a"), ("started", "b")):
        ledger.write(event, id, 1)
    assert ledger.count("started") == 3
    assert ledger.times("started") == {"a": 1, "b": 2}
    assert ledger.unfinished(os.getpid()) == {"b"}


def test_a_node_can_be_frozen_stopped_killed_and_started_again(node: RabbitNode) -> None:
    node.add_vhost("lasting")
    node.pause()
    assert not node.serving
    node.resume()
    wait_until(lambda: node.serving, "it goes on", 10)
    for end in (node.stop, node.kill):
        first = node.pid
        end()
        assert node.pid is None
        assert not node.serving
        took = node.start()
        assert node.pid not in (None, first)
        print(f"{end.__name__}: serving again after {took:.1f} s")
    assert "lasting" in node.ctl("list_vhosts").splitlines()
    node.delete_vhost("lasting")
    with pytest.raises(RuntimeError, match=r"delete_vhost lasting: .*not.*exist"):
        node.delete_vhost("lasting")
