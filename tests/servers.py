"""Servers that some tests need."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterable, Iterator
from typing import NoReturn
from urllib.parse import urlsplit

import psycopg
import pytest

from penstock.testing.faults import find_nats_server, find_postgres, find_redis, find_server

AMQP = os.environ.get("PENSTOCK_TEST_AMQP", "amqp://guest:guest@127.0.0.1:5672/")
"""The RabbitMQ server that tests share."""

REDIS = os.environ.get("PENSTOCK_TEST_REDIS", "redis://127.0.0.1:6379/0")
"""The Redis server that tests share."""
POSTGRES = os.environ.get("PENSTOCK_TEST_POSTGRES", "postgresql://penstock:penstock@127.0.0.1:5432/penstock")
"""The PostgreSQL database that tests share, each in a schema of its own."""
NATS = os.environ.get("PENSTOCK_TEST_NATS", "nats://127.0.0.1:4222")
"""The NATS server that tests share."""

_CTL_WITHIN = 30.0  # seconds

_numbers = itertools.count(1)


def require(name: str) -> None:
    """Go on only with the programs of a server installed: without them the test is skipped, or fails
    where the environment promises all of them."""
    if name == "rabbitmq":
        if find_server() is None:
            absent("no RabbitMQ server is installed (Debian: rabbitmq-server)")
    elif name == "redis":
        if find_redis() is None:
            absent("no Redis server is installed (Debian: redis-server)")
    elif name == "postgresql":
        if find_postgres() is None:
            absent("no PostgreSQL server is installed (Debian: postgresql)")
    elif name == "nats":
        if find_nats_server() is None:
            absent("no NATS server is installed (Debian: nats-server)")
    else:
        raise ValueError(f"no server {name!r} is known here")


def absent(reason: str) -> NoReturn:
    """Skip for this reason; fail for it where nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def rabbitmq_vhost(suffix: str = "") -> Iterator[str]:
    """The URL of a vhost of our own on the shared server, or of its `/` where this user may not make one."""
    address = urlsplit(AMQP)
    try:
        socket.create_connection((address.hostname or "127.0.0.1", address.port or 5672), timeout=5).close()
    except OSError as error:
        absent(f"no RabbitMQ listens on {address.hostname}:{address.port or 5672} (make test starts one): {error}")
    name = f"penstock-tests-{os.getpid()}{suffix}"
    own = _ctl("add_vhost", name) and _ctl("set_permissions", "-p", name, address.username or "guest", *[".*"] * 3)
    try:
        yield f"{address.scheme}://{address.netloc}/{name if own else ''}"
    finally:
        _ctl("delete_vhost", name)


@contextlib.contextmanager
def redis_namespace(name: str = "") -> Iterator[str]:
    """The URL of a namespace of our own on the shared server; what is in it afterwards is deleted."""
    address = urlsplit(REDIS)
    at = (address.hostname or "127.0.0.1", address.port or 6379)
    try:
        socket.create_connection(at, timeout=5).close()
    except OSError as error:
        absent(f"no Redis listens on {at[0]}:{at[1]} (make test starts one): {error}")
    namespace = f"tests-{os.getpid()}-{name or uuid.uuid4().hex[:8]}"
    yield f"{REDIS}?vhost={namespace}"
    asyncio.run(_delete_keys(REDIS, f"{{penstock*:{namespace}}}:*"))


async def _delete_keys(url: str, pattern: str) -> None:
    from penstock.redis.address import parse_address
    from penstock.redis.link import Link

    link = Link(parse_address(url))
    cursor = b"0"
    while True:
        cursor, keys = await link.call("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
        if keys:
            await link.call("UNLINK", *keys)
        if cursor == b"0":
            break
    link.close()


async def delete_queues(url: str, names: Iterable[str]) -> None:
    """Delete queues of a RabbitMQ vhost and, with what waits in them, the parking places of delays."""
    import aiormq

    from penstock.brokers.amqp.topology import PARKING, PARKING_TIMES

    async with aiormq.connect(url) as connection:
        channel = await connection.channel()
        for name in (*names, *(f"{PARKING}.{milliseconds}" for milliseconds in PARKING_TIMES)):
            await channel.queue_delete(name)


@functools.cache
def postgres_database() -> str:
    """The URL of the database that tests share, with no schema in it."""
    try:
        psycopg.connect(POSTGRES, connect_timeout=5).close()
    except psycopg.OperationalError as error:
        absent(f"no database for tests (make test makes one; PENSTOCK_TEST_POSTGRES names another): {error}")
    return POSTGRES


@contextlib.contextmanager
def postgres_schemas(prefix: str = "") -> Iterator[str]:
    """The URL of a schema of our own in the shared database; dropped with all whose names begin alike."""
    url = postgres_database()
    schema = f"t{prefix}{os.getpid()}_{next(_numbers)}"
    try:
        yield f"{url}?schema={schema}"
    finally:
        asyncio.run(_drop_schemas(url, schema))


async def _drop_schemas(url: str, prefix: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        for row in await connection.fetch("SELECT nspname FROM pg_namespace WHERE starts_with(nspname, $1)", prefix):
            name = row["nspname"].replace('"', '""')
            await connection.execute(f'DROP SCHEMA "{name}" CASCADE')
    finally:
        await connection.close()


@contextlib.contextmanager
def nats_space(name: str) -> Iterator[str]:
    """The URL of an empty space on the shared NATS server, which is removed at the end."""
    address = urlsplit(NATS)
    try:
        socket.create_connection((address.hostname or "127.0.0.1", address.port or 4222), timeout=5).close()
    except OSError as error:
        absent(f"no NATS listens on {address.hostname}:{address.port or 4222} (make test starts one): {error}")
    try:
        yield f"{NATS.rstrip('/')}/{name}"
    finally:
        asyncio.run(delete_streams(NATS, name))


async def delete_streams(url: str, space: str) -> None:
    """Delete all streams of a space on NATS."""
    import nats

    client = await nats.connect(url)
    try:
        manager = client.jsm()
        for one in await manager.streams_info():
            if one.config.name is not None and one.config.name.startswith(f"{space}-"):
                await manager.delete_stream(one.config.name)
    finally:
        await client.close()


def _ctl(*arguments: str) -> bool:
    """Whether `rabbitmqctl` did it."""
    program = shutil.which("rabbitmqctl", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        return False
    try:
        return not subprocess.run([program, "-q", *arguments], capture_output=True, timeout=_CTL_WITHIN).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False
