"""`Bot`: Slack by the token of one job: who it is, whom it hears, what it writes."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from penstock.clock import backoff_delay
from penstock.node.slack import api
from penstock.node.slack.said import Origin, Said

log = logging.getLogger("penstock.slack")

BACKOFF = (0.5, 30.0)  # seconds between tries
SLOWLY = 300.0  # seconds between tries of a token that Slack refuses
KNOWN_FOR = 300.0  # seconds that a user's names are remembered
MOST_KNOWN = 10_000
MOST_AT_HAND = 100  # messages that a job holds; of more Slack keeps what it has
WRITING = 60.0  # seconds within which an answer must be written

ID = re.compile("[UW][A-Z0-9]{5,}")
"""What looks like a user's id is one: else whoever chose to be shown as it would be heard."""

Heard = Callable[[Said, str], Awaitable[None]]


class NotYet(Exception):
    """It is not to be acknowledged: Slack is to send it again."""


class Home(msgspec.Struct, frozen=True):
    """The workspace of a bot. In a channel that is shared with others there are their people, too."""

    team: str
    enterprise: str | None

    def holds(self, user: Mapping[str, Any]) -> bool:
        """Whether somebody is of it. In an organisation people have one home, and may be of several workspaces."""
        if user.get("is_stranger"):
            return False
        if user.get("team_id") == self.team:
            return True
        grid = user.get("enterprise_user")
        if self.enterprise is None or not isinstance(grid, Mapping) or grid.get("enterprise_id") != self.enterprise:
            return False
        return self.team in (self.enterprise, *(grid.get("teams") or ()))


class Bot:
    """A job's. `topics` are the users that it hears. For one event loop.

    `certain`: only ids and the names of accounts count, as what they are shown people choose as they like; and only
    people of its own workspace.
    """

    def __init__(self, job: str, token: str, topics: Sequence[str], heard: Heard, certain: bool) -> None:
        self.job = job
        self._web = api.web_client(token)
        self._listed: dict[str, str] = {}
        for topic in topics:
            self._listed.setdefault(topic.removeprefix("@"), topic)
        self._names = {name: topic for name, topic in self._listed.items() if not ID.fullmatch(name)}
        self._heard = heard
        self._certain = certain
        self._self: str | None = None
        self._home: Home | None = None
        self._refused = False
        self._known: dict[str, tuple[float, tuple[str, ...] | None]] = {}

    @property
    def refused(self) -> bool:
        """Slack does not take its token."""
        return self._refused and self._self is None

    async def introduce(self) -> None:
        """Until Slack has told who the bot is. A token that it refuses is tried again slowly."""
        failures = 0
        while self._self is None:
            try:
                found = await self._web.auth_test()
                self._home = Home(str(found.get("team_id")), found.get("enterprise_id"))
                self._self = str(found.get("user_id"))
                return
            except Exception as error:
                if api.refused(error):
                    self._refused = True
                    told = "job %s: Slack does not take slack.token, again in %.0f s or when that changes: %s"
                    log.error(told, self.job, SLOWLY, api.told(error))
                    await asyncio.sleep(SLOWLY)
                    continue
                failures += 1
                delay = backoff_delay(failures, BACKOFF, random.Random())  # noqa: S311 - jitter
                log.warning("job %s: Slack is not reached, again in %.1f s: %s", self.job, delay, api.told(error))
            await asyncio.sleep(delay)

    async def hear(self, said: Said) -> bool:
        """Take what was said, if it is for this bot; once this has returned it is kept. Whether it is.

        :raises NotYet: it is not known whether it is for this bot.
        :raises Exception: so says Slack. Nothing was taken.
        """
        if self._self is None:
            raise NotYet(f"job {self.job} does not know its bot yet")
        if said.user == self._self:
            return True
        listed = await self._listed_as(said.user)
        if listed is None:
            log.debug("job %s: %s is not listed", self.job, said.user)
            return False
        await self._heard(said, listed)
        return True

    async def answer(self, origin: Origin, text: str) -> None:
        """Write back. What cannot be written is logged: whoever asked has the run, and no more."""
        failures = 0
        try:
            async with asyncio.timeout(WRITING):
                while True:
                    try:
                        await self._web.chat_postMessage(channel=origin.channel, text=text, thread_ts=origin.thread)
                        return
                    except Exception as error:
                        if (code := api.code_of(error)) is not None and code not in _PASSING:
                            log.error("job %s: an answer cannot be written: %s", self.job, api.told(error))
                            return
                        failures += 1
                        delay = backoff_delay(failures, BACKOFF, random.Random())  # noqa: S311 - jitter
                        told = "job %s: an answer is not written, again in %.1f s: %s"
                        log.warning(told, self.job, delay, api.told(error))
                    await asyncio.sleep(delay)
        except TimeoutError:
            log.error("job %s: an answer cannot be written within %.0f s", self.job, WRITING)

    async def _listed_as(self, user: str) -> str | None:
        """How the job lists a user, if it does."""
        listed = self._listed.get(user)
        if listed is not None and not self._certain:
            return listed
        if listed is None and not self._names:
            return None
        names = await self._names_of(user)
        if names is None:
            return None
        return listed or next((topic for name, topic in self._names.items() if name in names), None)

    async def _names_of(self, user: str) -> tuple[str, ...] | None:
        """None: no person of this workspace."""
        assert self._home is not None
        known = self._known.get(user)
        if known is not None and time.monotonic() - known[0] < KNOWN_FOR:
            return known[1]
        try:
            found: Any = (await self._web.users_info(user=user)).get("user")
        except Exception as error:
            if (code := api.code_of(error)) not in _UNKNOWN:
                raise
            otherwise = "" if self._certain else ", or ids in topics"
            hint = f" (the bot needs the scope users:read{otherwise})" if code == "missing_scope" else ""
            log.error("job %s: what %s said is dropped, for who that is: %s%s", self.job, user, api.told(error), hint)
            return None
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        person = isinstance(found, Mapping) and not found.get("is_bot") and self._home.holds(found)
        names = _names_of(found, self._certain) if person else None
        self._known[user] = time.monotonic(), names
        return names


_PASSING = frozenset({"fatal_error", "internal_error", "ratelimited", "request_timeout", "service_unavailable"})
"""Errors of Slack after which it may do what was asked."""
_UNKNOWN = frozenset({"missing_scope", "user_not_found", "user_not_visible"})


def _names_of(user: Mapping[str, Any], certain: bool) -> tuple[str, ...]:
    profile = user.get("profile")
    shown = profile.get("display_name") if isinstance(profile, Mapping) and not certain else None
    return tuple(name for name in (user.get("name"), shown) if isinstance(name, str) and name)
