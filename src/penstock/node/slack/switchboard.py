"""`Switchboard`: which jobs of a node listen to Slack, and over which connections."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import msgspec

from penstock.errors import ConfigError
from penstock.life import Life
from penstock.node.definitions import JobDefinition, SlackOption
from penstock.node.jobs import Job
from penstock.node.slack import api
from penstock.node.slack.bot import SLOWLY, Bot
from penstock.node.slack.intake import Injections, Intake, Letters
from penstock.node.slack.line import Hearers, Line

log = logging.getLogger("penstock.slack")

GRACE = 5.0  # seconds that injected code gets when the node stops, at most


class _Place(msgspec.Struct):
    """A job that listens."""

    wants: tuple[SlackOption | None, tuple[str, ...]]
    bot: Bot | None = None
    intake: Intake | None = None
    app_token: str | None = None
    introducing: asyncio.Task[None] | None = None


class Switchboard:
    """Brings jobs to Slack and away from it. Nothing that is wrong with one of them stops another. For one event
    loop."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._wanted: list[JobDefinition] = []
        self._places: dict[str, _Place] = {}
        self._lines: dict[str, Line] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._complaints: dict[str, str] = {}
        """What was last said against the definition of a job."""

    def want(self, definitions: Iterable[JobDefinition]) -> None:
        """What jobs there are to be, before any is brought: what may be for one that is not here yet, or cannot be, is
        not acknowledged."""
        self._wanted = [one for one in definitions if one.slack is not None]

    async def usable(self, definition: JobDefinition) -> bool:
        """Whether this node can do what the definition wants; if not, the log says so."""
        if definition.slack is None:
            return True
        missing = await asyncio.to_thread(api.missing)
        if missing is not None:
            self._complain(definition, f"it listens to Slack, and {missing} is not installed: {api.HINT}")
            return False
        try:
            api.bot_token(definition.slack.token)
        except ConfigError as error:  # it would take the tasks of nodes that could answer
            self._complain(definition, f"it does not listen to Slack: {error}")
            return False
        return True

    async def bring(self, job: Job) -> None:
        """Have a job listen as its definition says. Idempotent."""
        definition = job.definition
        option, name = definition.slack, definition.name
        wants = option, definition.topics
        here = self._places.get(name)
        if here is not None and here.wants == wants and here.bot is job.bot:
            return
        await self.leave(name)
        if option is None:
            job.bot = None
            return
        place = self._places[name] = _Place(wants)
        try:
            token = api.bot_token(option.token)
        except ConfigError as error:
            job.bot = None
            self._complain(definition, f"it does not listen to Slack: {error}")
            return
        letters, life = not option.code_injection, self._life
        intake = Letters(life, job, token) if letters else Injections(life, job, self._running)
        job.bot = Bot(name, token, definition.topics, intake.take, certain=option.code_injection)
        place.bot, place.intake = job.bot, intake
        introducing = self._introduce(place, job.bot, definition)
        place.introducing = asyncio.create_task(introducing, name=f"penstock-slack {name}")

    async def leave(self, name: str) -> None:
        """A job listens no more; code that runs for it ends by itself. Idempotent."""
        place = self._places.get(name)
        if place is None:
            return
        place.bot = None
        if place.introducing is not None:
            place.introducing.cancel()
            await asyncio.gather(place.introducing, return_exceptions=True)
        if place.app_token is not None and not self._bots(place.app_token):
            line = self._lines.pop(place.app_token, None)
            if line is not None:
                await line.close()
        if place.intake is not None:
            await place.intake.close()
        self._places.pop(name, None)

    async def close(self, grace: float) -> None:
        """Nobody is heard any more; code that runs has a few seconds of the grace. Idempotent."""
        for place in self._places.values():
            if place.introducing is not None:
                place.introducing.cancel()
        lines = list(self._lines.values())
        self._lines.clear()
        await asyncio.gather(*(line.close() for line in lines))
        for name in list(self._places):
            await self.leave(name)
        if self._running:
            await asyncio.wait(self._running, timeout=min(grace, GRACE))
        ending = list(self._running)
        for running in ending:
            running.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    async def _introduce(self, place: _Place, bot: Bot, definition: JobDefinition) -> None:
        app_token = place.app_token = await self._app_token(definition)
        await bot.introduce()
        if app_token not in self._lines:
            self._lines[app_token] = Line(app_token, lambda: self._hearers(app_token))

    async def _app_token(self, definition: JobDefinition) -> str:
        """Once there is one: a file may come later."""
        assert definition.slack is not None
        while True:
            try:
                found = await asyncio.to_thread(api.app_token, definition.slack.app_token)
                if found:
                    self._complaints.pop(definition.name, None)
                    return found
                why = f" without an app token: slack.app_token or {api.APP_TOKENS[1]}"
            except ConfigError as error:
                why = f": {error}"
            self._complain(definition, f"it does not listen to Slack{why}")
            await asyncio.sleep(SLOWLY)

    def _bots(self, app_token: str) -> list[Bot]:
        bots = (one.bot for one in self._places.values() if one.app_token == app_token)
        return [bot for bot in bots if bot is not None and not bot.refused]

    def _hearers(self, app_token: str) -> Hearers:
        bots = self._bots(app_token)
        here = {bot.job for bot in bots}
        return Hearers(bots, [one for one in self._wanted if one.name not in here])

    def _complain(self, definition: JobDefinition, what: str) -> None:
        """Once for each text of a definition."""
        if self._complaints.get(definition.name) != definition.text:
            self._complaints[definition.name] = definition.text
            log.error("%s: job %s: %s", definition.place, definition.name, what)
