"""`Line`: the connection in Socket Mode over which Slack tells of events.

It is not slack-sdk's own client: that one tries a token which Slack refuses for ever, every five seconds with a
traceback, connects again with a ticket that is used up, cannot be told to wait longer each time, and closes what it
has before it has another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.clock import backoff_delay
from penstock.errors import ConfigError
from penstock.node.definitions import JobDefinition
from penstock.node.slack import api
from penstock.node.slack.bot import BACKOFF, MOST_AT_HAND, SLOWLY, Bot, NotYet
from penstock.node.slack.said import Said, direct_message

if TYPE_CHECKING:
    from aiohttp import ClientWebSocketResponse

log = logging.getLogger("penstock.slack")

HEARTBEAT = 10.0  # seconds between pings; half of them later a connection that does not answer is given up
CONNECTING = 30.0  # seconds
STEADY = 30.0  # seconds after which a connection that is lost was a good one
CLOSING = 1.0  # seconds


class Hearers(msgspec.Struct):
    """Who would hear something now."""

    bots: Sequence[Bot]
    absent: Sequence[JobDefinition]
    """Jobs that are to listen to Slack, and have no bot here."""


class Line:
    """Slack gives each event to one of the connections of an app. So all jobs of an app share one, which is begun
    again for ever. For one event loop."""

    def __init__(self, app_token: str, hearers: Callable[[], Hearers]) -> None:
        self._app_token = app_token
        self._hearers = hearers
        self._at_hand: set[asyncio.Task[None]] = set()
        self._links: set[asyncio.Task[str]] = set()
        """The connection, and for a moment the one before it."""
        self._running = asyncio.create_task(self._run(), name="penstock-slack line")

    async def close(self) -> None:
        """What is not acknowledged by now comes again, to whoever is connected then. Idempotent."""
        ending = [self._running, *self._links, *self._at_hand]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    @property
    def _of(self) -> str:
        return ", ".join(sorted(bot.job for bot in self._hearers().bots))

    async def _run(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                why = await self._until_another_is_needed()
            except Exception as error:
                why = api.told(error)
                if api.refused(error):
                    told = "Slack does not take the app token of %s, again in %.0f s or when that changes: %s"
                    log.error(told, self._of, SLOWLY, why)
                    await asyncio.sleep(SLOWLY)
                    continue
            failures = 1 if time.monotonic() - began > STEADY else failures + 1
            delay = backoff_delay(failures, BACKOFF, random.Random())  # noqa: S311 - jitter
            level = logging.INFO if why == _ASKED else logging.WARNING
            log.log(level, "%s: not connected to Slack, again in %.1f s: %s", self._of, delay, why)
            await asyncio.sleep(delay)

    async def _until_another_is_needed(self) -> str:
        """One connection, until it ends or Slack asks for the next one, which is then begun before this one ends: no
        event falls in between. Why it is needed.

        :raises Exception: it was not to be had, or was lost.
        """
        asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        link = asyncio.create_task(self._listen(asked), name="penstock-slack link")
        self._links.add(link)
        link.add_done_callback(self._ended)
        either: set[asyncio.Future[Any]] = {link, asked}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return link.result() if link.done() else _ASKED

    def _ended(self, link: asyncio.Task[str]) -> None:
        self._links.discard(link)
        if not link.cancelled():
            link.exception()  # of one that has a successor nobody asks

    async def _listen(self, asked: asyncio.Future[None]) -> str:
        """One connection, until it ends; why it did."""
        import aiohttp

        web = api.web_client(None)
        async with contextlib.AsyncExitStack() as ending:
            opened = await web.apps_connections_open(app_token=self._app_token)
            session = await ending.enter_async_context(aiohttp.ClientSession())
            async with asyncio.timeout(CONNECTING):
                socket = await session.ws_connect(str(opened["url"]), heartbeat=HEARTBEAT, proxy=web.proxy)
            ending.push_async_callback(_close, socket)
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT and (why := self._heed(socket, message.data, asked)):
                    return why
            error = socket.exception()
            return "it was closed" if error is None else api.told(error)

    def _heed(self, socket: ClientWebSocketResponse, text: str, asked: asyncio.Future[None]) -> str | None:
        """One message; why the connection is to end, if that is what it says."""
        try:
            envelope = json.loads(text)
        except ValueError:
            return "it says what is not JSON"
        if not isinstance(envelope, dict):
            return None
        match envelope.get("type"):
            case "hello":
                log.info("%s: connected to Slack", self._of)
                if not asked.done():
                    for former in self._links - {asyncio.current_task()}:
                        former.cancel()
            case "disconnect":
                if envelope.get("reason") not in ("warning", "refresh_requested"):
                    return f"Slack says {envelope.get('reason')}"
                if not asked.done():
                    asked.set_result(None)
            case _ if envelope.get("envelope_id"):
                if len(self._at_hand) >= MOST_AT_HAND * (1 + len(self._hearers().bots)):
                    log.warning("%s: too much at hand: an event is left to Slack", self._of)
                    return None
                work = asyncio.create_task(self._take(socket, envelope), name="penstock-slack event")
                self._at_hand.add(work)
                work.add_done_callback(self._at_hand.discard)
        return None

    async def _take(self, socket: ClientWebSocketResponse, envelope: Mapping[str, Any]) -> None:
        """Have the jobs take an event, and acknowledge it once all of them have kept what is theirs."""
        payload = envelope.get("payload")
        about_messages = envelope.get("type") == "events_api" and isinstance(payload, Mapping)
        said = direct_message(payload) if about_messages and isinstance(payload, Mapping) else None
        if said is not None and not await self._kept(said):
            return
        try:
            await socket.send_str(json.dumps({"envelope_id": envelope["envelope_id"]}))
        except ConnectionError as error:  # it comes again, and is known then
            log.debug("an event is kept, and its acknowledgement lost: %s", error)

    async def _kept(self, said: Said) -> bool:
        hearers = self._hearers()
        outcomes = await asyncio.gather(*(bot.hear(said) for bot in hearers.bots), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, NotYet):
                log.info("an event is left to Slack: %s", outcome)
            elif isinstance(outcome, Exception):
                log.warning("an event is left to Slack, which sends it again: %s", api.told(outcome))
            elif isinstance(outcome, BaseException):
                raise outcome
        if any(isinstance(outcome, Exception) for outcome in outcomes):
            return False
        absent = [] if any(outcomes) else [job.name for job in hearers.absent if await self._may_serve(job)]
        if absent:
            log.info("an event is left to Slack, for it may be for jobs that do not listen here: %s", ", ".join(absent))
        return not absent

    async def _may_serve(self, job: JobDefinition) -> bool:
        """Whether a job is of this app, as far as this node can tell."""
        assert job.slack is not None
        try:
            token = await asyncio.to_thread(api.app_token, job.slack.app_token)
        except ConfigError:
            return True
        return token in (None, "", self._app_token)


async def _close(socket: ClientWebSocketResponse) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSING):
            await socket.close()


_ASKED = "Slack asks to connect anew"
