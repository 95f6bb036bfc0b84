"""What the node's example talks to, on loopback: Kafka, SQS, and doubles of Pub/Sub's REST, gRPC and a WebSocket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from aiohttp import web

from tests.helpers import eventually_sync

METHOD = "/feed.Feed/Watch"


@contextlib.contextmanager
def kafka() -> Iterator[str]:
    """The bootstrap servers of librdkafka's own mock cluster: of the protocol it speaks what clients need."""
    from confluent_kafka import Producer

    cluster = Producer({"test.mock.num.brokers": 3, "bootstrap.servers": "x"})
    brokers = cluster.list_topics(timeout=10).brokers.values()
    yield ",".join(f"{broker.host}:{broker.port}" for broker in brokers)


@contextlib.contextmanager
def sqs(folder: Path) -> Iterator[str]:
    """The endpoint of moto's server."""
    port = free_port()
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        eventually_sync(lambda: process.poll() is not None or listens(port), "moto listens", within=45)
        assert process.poll() is None, (folder / "moto.log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


class PubSub:
    """Pub/Sub's REST, as far as the example uses it: at least once, until acknowledged."""

    def __init__(self) -> None:
        self.topics: set[str] = set()
        self.subscriptions: dict[str, str] = {}
        self.waiting: dict[str, dict[str, dict[str, Any]]] = {}
        self._count = 0

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/v1/projects/{project}/topics/{topic}", self._create_topic),
            web.put("/v1/projects/{project}/subscriptions/{subscription}", self._create_subscription),
            web.post("/v1/projects/{project}/topics/{topic}:publish", self._publish),
            web.post("/v1/projects/{project}/subscriptions/{subscription}:pull", self._pull),
            web.post("/v1/projects/{project}/subscriptions/{subscription}:acknowledge", self._acknowledge),
        ]

    async def _create_topic(self, request: web.Request) -> web.Response:
        self.topics.add(request.match_info["topic"])
        return web.json_response({})

    async def _create_subscription(self, request: web.Request) -> web.Response:
        name, topic = request.match_info["subscription"], (await request.json())["topic"].rpartition("/")[2]
        if topic not in self.topics:
            raise web.HTTPNotFound
        if name in self.subscriptions:
            raise web.HTTPConflict
        self.subscriptions[name], self.waiting[name] = topic, {}
        return web.json_response({})

    async def _publish(self, request: web.Request) -> web.Response:
        topic = request.match_info["topic"]
        if topic not in self.topics:
            raise web.HTTPNotFound
        ids = []
        for message in (await request.json())["messages"]:
            base64.b64decode(message["data"], validate=True)
            self._count += 1
            ids.append(str(self._count))
            told = {**message, "messageId": ids[-1], "publishTime": datetime.now(UTC).isoformat()}
            for name, of in self.subscriptions.items():
                if of == topic:
                    self.waiting[name][ids[-1]] = told
        return web.json_response({"messageIds": ids})

    async def _pull(self, request: web.Request) -> web.Response:
        most = (await request.json())["maxMessages"]
        waiting = list(self.waiting[request.match_info["subscription"]].items())[:most]
        return web.json_response({"receivedMessages": [{"ackId": id, "message": one} for id, one in waiting]})

    async def _acknowledge(self, request: web.Request) -> web.Response:
        for id in (await request.json())["ackIds"]:
            self.waiting[request.match_info["subscription"]].pop(id, None)
        return web.json_response({})


class Outside:
    """Servers in a loop of their own."""

    def __init__(self) -> None:
        self.pubsub = PubSub()
        self.http = self.grpc = ""
        """Addresses: host and port."""
        self.connections = 0
        """WebSockets there were up to now."""
        self.cut: Callable[[], None] = lambda: None
        """Cut the WebSockets that there are."""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        sockets: set[web.WebSocketResponse] = set()
        loop = asyncio.get_running_loop()

        async def feed(request: web.Request) -> web.WebSocketResponse:
            response = web.WebSocketResponse()
            await response.prepare(request)
            sockets.add(response)
            self.connections += 1
            await response.send_json({"number": self.connections})
            async for _ in response:
                pass
            sockets.discard(response)
            return response

        def cut() -> None:
            for one in list(sockets):
                asyncio.run_coroutine_threadsafe(one.close(), loop)

        async def watch(request: Any, _: Any) -> AsyncIterator[Any]:
            for number in range(request["since"], 3):
                yield {"number": number}
            await asyncio.Event().wait()

        app = web.Application()
        app.add_routes([*self.pubsub.routes(), web.get("/feed", feed)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.http = "{}:{}".format(*runner.addresses[0])
        self.cut = cut
        server = grpc.aio.server()
        handler: Any = grpc.unary_stream_rpc_method_handler(
            watch, request_deserializer=json.loads, response_serializer=lambda event: json.dumps(event).encode()
        )
        service, _, method = METHOD.strip("/").partition("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.grpc = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield
        finally:
            await server.stop(0)
            await runner.cleanup()


@contextlib.contextmanager
def outside() -> Iterator[Outside]:
    """In a thread."""
    made, up = Outside(), Future[None]()
    stop: list[Callable[[], Any]] = []

    async def serve() -> None:
        end = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(end.set))
        async with made.serving():
            up.set_result(None)
            await end.wait()

    def run(work: Callable[[], Awaitable[None]]) -> None:
        try:
            asyncio.run(work())  # type: ignore[arg-type]
        except BaseException as error:
            if up.done():
                raise
            up.set_exception(error)

    thread = threading.Thread(target=run, args=(serve,), name="outside")
    thread.start()
    try:
        up.result(20)
        yield made
    finally:
        stop[0]()
        thread.join(20)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def environment(**told: str) -> dict[str, str]:
    """That of this process without what a developer may have set for Penstock or the drivers."""
    ours = ("PENSTOCK_", "KAFKA", "SQS_", "AWS_", "GCP_", "PUBSUB_", "GOOGLE_", "GRPC_", "WEBSOCKET_", "STATE_")
    return {**{name: value for name, value in os.environ.items() if not name.startswith(ours)}, **told}
