"""`amqps://`: the line is encrypted and the server's certificate is looked at.

The server behind is the real one; TLS ends in a few lines of this file, in front of it.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from penstock.brokers.amqp import AmqpBroker
from penstock.brokers.base import Queue
from penstock.errors import BrokerRefused
from penstock.testing.conformance.harness import acks, ids, message
from tests.servers import delete_queues

pytestmark = pytest.mark.blocks  # certificates are made and loaded


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1, with its key in the same file."""
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "server.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=penstock-test",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", made],
        check=True, capture_output=True,
    )  # fmt: skip
    made.write_bytes(made.read_bytes() + (folder / "key.pem").read_bytes())
    return made


@pytest_asyncio.fixture
async def tls_url(amqp_url: str, certificate: Path) -> AsyncIterator[str]:
    """The server's URL through TLS."""
    address = urlsplit(amqp_url)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(address.hostname, address.port)
        await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    yield f"amqps://{address.username}:{address.password}@127.0.0.1:{port}{address.path}"
    server.close()


async def test_messages_travel_through_tls(tls_url: str, amqp_url: str, certificate: Path) -> None:
    broker = AmqpBroker(f"{tls_url}?cafile={certificate}")
    await broker.declare(Queue("work"))
    sent = message("work", b"secret" * 100_000)
    assert list(await broker.publish([sent])) == [None]
    subscription = broker.subscribe([Queue("work")], prefetch=5, lease=30, on_lost=lambda lost: None)
    taken = await subscription.receive(1, 10)
    assert (ids(taken), taken[0].raw) == ([sent.id], sent.body)
    assert not await subscription.settle(acks(taken))
    await broker.close()
    await delete_queues(amqp_url, ["work"])


async def test_a_certificate_that_nobody_vouches_for_is_refused(tls_url: str) -> None:
    broker = AmqpBroker(tls_url)
    with pytest.raises(BrokerRefused, match="certificate verify failed") as caught:
        await broker.open()
    assert "\n" not in str(caught.value)
    await broker.close()


async def test_it_can_be_trusted_blindly_if_the_url_says_so(tls_url: str) -> None:
    broker = AmqpBroker(f"{tls_url}?no_verify_ssl=1")
    await broker.open()
    await broker.close()
