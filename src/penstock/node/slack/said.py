"""What people say to a bot in Slack, what is written back, and how a task remembers whom it is from."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

import msgspec

from penstock.control import masking
from penstock.errors import one_line, printable
from penstock.node.mu import plain

HEADER = "slack"
"""Of a task's message: the `Origin` as JSON, after its signature: others than the bot may set headers, too."""
LONGEST = 4000
"""Characters that are written back."""
LONGEST_ERROR = 1000
CUT = "… (cut)"
_OF_PEOPLE = (None, "file_share")
"""The subtypes of messages that somebody has just written; the others tell of edits, of bots and of channels."""


class Said(msgspec.Struct, frozen=True):
    """A direct message."""

    event: str
    """The same each time that Slack sends it."""
    user: str
    """Slack's id of whoever wrote it."""
    channel: str
    ts: str
    """When; unique in its channel."""
    text: str
    thread: str | None
    """The `ts` of the message that it is an answer to."""

    def taskid(self, job: str) -> str:
        """The id of its task for a job: the same each time that Slack sends it, and as those of other tasks it begins
        with its time."""
        try:
            milliseconds = int(float(self.ts) * 1000)
        except (ValueError, OverflowError):
            milliseconds = 0
        digest = hashlib.sha256(f"{job}\0{self.channel}\0{self.event}".encode()).hexdigest()
        return f"{milliseconds & (2**48 - 1):012x}{digest[:20]}"


class Origin(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a task comes from, and its answer goes."""

    listed: str
    """The user, as the job lists them."""
    channel: str
    thread: str | None = None


def direct_message(payload: Mapping[str, Any]) -> Said | None:
    """The direct message that an event tells of; None: it tells of something else, or a bot wrote it."""
    event = payload.get("event")
    if not isinstance(event, Mapping) or event.get("type") != "message" or event.get("channel_type") != "im":
        return None
    if event.get("subtype") not in _OF_PEOPLE or event.get("bot_id") or event.get("hidden"):
        return None
    user, channel, ts, text = (event.get(key) for key in ("user", "channel", "ts", "text"))
    if not all(isinstance(one, str) and one for one in (user, channel, ts)) or not isinstance(text, str):
        return None
    thread = event.get("thread_ts")
    return Said(
        event=str(payload.get("event_id") or ts),
        user=str(user),
        channel=str(channel),
        ts=str(ts),
        text=unescaped(text),
        thread=thread if isinstance(thread, str) else None,
    )


def content_of(said: Said) -> dict[str, Any]:
    """The content of its task."""
    return {"text": said.text, "user": said.user, "channel": said.channel, "ts": said.ts}


def header_of(origin: Origin, job: str, token: str) -> str:
    """Signed with the token of the job's bot."""
    text = msgspec.json.encode(origin).decode()
    return f"{_signature(text, job, token)} {text}"


def origin_of(headers: Mapping[str, Any], job: str, token: str) -> Origin | None:
    """None: the message is not from this job's bot."""
    header = headers.get(HEADER)
    if not isinstance(header, str):
        return None
    signature, _, text = header.partition(" ")
    try:
        if not hmac.compare_digest(signature.encode(), _signature(text, job, token).encode()):
            return None
        return msgspec.json.decode(text, type=Origin)
    except (msgspec.DecodeError, UnicodeError):
        return None


def _signature(text: str, job: str, token: str) -> str:
    return hmac.new(token.encode(), f"{job}\0{text}".encode(), hashlib.sha256).hexdigest()


def unescaped(text: str) -> str:
    """As it was typed: Slack writes three characters in another way."""
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def answer_of(value: Any) -> str | None:
    """What is written back of a value; None: nothing."""
    if value is None:
        return None
    text = printable(value if isinstance(value, str) else str(plain(value)))
    return cut(text) if text.strip() else None


def failure_of(error: BaseException) -> str:
    """The same of an error: one line, without what looks like a secret."""
    line = masking.line(one_line(error), LONGEST_ERROR)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - len(CUT)] + CUT
