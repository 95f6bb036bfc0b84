"""Servers that some tests need."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from typing import NoReturn
from urllib.parse import urlsplit

import pytest

from penstock.testing.faults import find_server

AMQP = os.environ.get("PENSTOCK_TEST_AMQP", "amqp://guest:guest@127.0.0.1:5672/")
"""The RabbitMQ server that tests share."""

_CTL_WITHIN = 30.0  # seconds


def require(name: str) -> None:
    """Go on only with the programs of a server installed: without them the test is skipped, or fails
    where the environment promises all of them."""
    if name == "rabbitmq":
        if find_server() is None:
            absent("no RabbitMQ server is installed (Debian: rabbitmq-server)")
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


async def delete_queues(url: str, names: Iterable[str]) -> None:
    """Delete queues of a RabbitMQ vhost and, with what waits in them, the parking places of delays."""
    import aiormq

    from penstock.brokers.amqp.topology import PARKING, PARKING_TIMES

    async with aiormq.connect(url) as connection:
        channel = await connection.channel()
        for name in (*names, *(f"{PARKING}.{milliseconds}" for milliseconds in PARKING_TIMES)):
            await channel.queue_delete(name)


def _ctl(*arguments: str) -> bool:
    """Whether `rabbitmqctl` did it."""
    program = shutil.which("rabbitmqctl", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        return False
    try:
        return not subprocess.run([program, "-q", *arguments], capture_output=True, timeout=_CTL_WITHIN).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False
