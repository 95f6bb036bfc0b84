"""A double of Slack: the part of its Web API and of Socket Mode that jobs use, on a port of this machine.

What it answers is what Slack's documentation says; no test here has seen Slack itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import WSMsgType, web

BOT, APP = "xoxb-1-bot", "xapp-1-A1-app"
"""The tokens that it takes."""
SELF = "UBOT"
TEAM = "T1"


class Slack:
    """People write (`say`), and what the bot writes is in `written`."""

    def __init__(self) -> None:
        self.url = ""
        self.users: dict[str, dict[str, Any]] = {}
        self.enterprise: str | None = None
        """The organisation of its workspace."""
        self.written: list[dict[str, Any]] = []
        self.acks: list[str] = []
        self.calls: list[str] = []
        """The methods that were called."""
        self.connections = 0
        """How many there have been."""
        self.sockets: list[web.WebSocketResponse] = []
        """Those that are open."""
        self.bot_tokens, self.app_tokens = {BOT}, {APP}
        self.failures: dict[str, list[tuple[int, dict[str, str], dict[str, Any]]]] = {}
        """Of each method: status, headers and body of its next answers."""
        self.opening = asyncio.Event()
        """Cleared: whoever wants to connect waits."""
        self.opening.set()
        self._events, self._others = itertools.count(1), itertools.count(1)
        self.person("U1", "neo", "Neo A.")

    def person(self, id: str, name: str, display: str = "", **more: Any) -> None:
        user = {"id": id, "team_id": TEAM, "name": name, "profile": {"display_name": display}, "is_bot": False}
        self.users[id] = {**user, **more}

    # -- what people do

    def event(self, text: str, user: str = "U1", **more: Any) -> dict[str, Any]:
        """A direct message, as an event that was not sent yet."""
        number = next(self._events)
        event = {
            "type": "message",
            "channel_type": "im",
            "channel": f"D{user}",
            "user": user,
            "text": text,
            "ts": f"1700000000.{number:06d}",
            **more,
        }
        return {"type": "event_callback", "team_id": TEAM, "event_id": f"Ev{number}", "event": event}

    async def say(self, text: str, user: str = "U1", **more: Any) -> str:
        """Write to the bot; the envelope's id."""
        return await self.send(self.event(text, user, **more))

    async def send(self, payload: dict[str, Any]) -> str:
        """An event to one of the connections; the envelope's id."""
        envelope = f"e{next(self._others)}"
        await self.sockets[0].send_json(
            {"type": "events_api", "envelope_id": envelope, "payload": payload, "accepts_response_payload": False}
        )
        return envelope

    async def disconnect(self, reason: str = "refresh_requested") -> None:
        """Ask the connections to connect anew."""
        for socket in list(self.sockets):
            await socket.send_json({"type": "disconnect", "reason": reason})

    def drop(self) -> None:
        """Every connection is lost, without a word."""
        for socket in self.sockets:
            request: Any = socket._req
            request.transport.abort()

    @property
    def texts(self) -> list[str]:
        return [one["text"] for one in self.written]

    # -- what it serves

    async def api(self, request: web.Request) -> web.StreamResponse:
        method = request.match_info["method"]
        self.calls.append(method)
        if self.failures.get(method):
            status, headers, body = self.failures[method].pop(0)
            return web.json_response(body, status=status, headers=headers)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        tokens = self.app_tokens if method == "apps.connections.open" else self.bot_tokens
        if token not in tokens:
            return web.json_response({"ok": False, "error": "invalid_auth"})
        given = dict(await request.post()) or dict(request.query) or await _json(request)
        return web.json_response(await self._answer(method, given))

    async def _answer(self, method: str, given: dict[str, Any]) -> dict[str, Any]:
        match method:
            case "auth.test":
                return {"ok": True, "user_id": SELF, "bot_id": "B1", "team_id": TEAM, "enterprise_id": self.enterprise}
            case "apps.connections.open":
                await self.opening.wait()
                return {"ok": True, "url": self.url.replace("http", "ws") + f"link?ticket={next(self._others)}"}
            case "users.info":
                user = self.users.get(given["user"])
                return {"ok": True, "user": user} if user else {"ok": False, "error": "user_not_found"}
            case "chat.postMessage":
                self.written.append(given)
                return {"ok": True, "channel": given["channel"], "ts": "1700000001.000001"}
        return {"ok": False, "error": "unknown_method"}

    async def link(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.connections += 1
        await socket.send_json({"type": "hello", "num_connections": 1})
        self.sockets.append(socket)
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    self.acks.append(json.loads(message.data)["envelope_id"])
        finally:
            self.sockets.remove(socket)
        return socket


async def _json(request: web.Request) -> dict[str, Any]:
    text = await request.text()
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


@asynccontextmanager
async def serving() -> AsyncIterator[Slack]:
    slack = Slack()
    app = web.Application()
    app.router.add_route("*", "/api/link", slack.link)
    app.router.add_route("*", "/api/{method}", slack.api)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    slack.url = f"http://127.0.0.1:{port}/api/"
    try:
        yield slack
    finally:
        for socket in list(slack.sockets):
            await socket.close()
        await runner.cleanup()
