"""What JetStream is asked over its API: streams, consumers, single messages; and what its refusals mean."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from penstock.brokers.nats.line import Line, NobodyThereError, ask
from penstock.brokers.nats.names import CONSUMER
from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable, PublishError, StorageFull

log = logging.getLogger("penstock.nats")

NOT_FOUND = (10014, 10037, 10059)  # a consumer, a message, a stream
NOT_ENABLED = (10039, 10076)
OVERLAPS = 10065
EXISTS = (10013, 10105, 10148)  # a consumer of another shape
NO_ROOM = (10002, 10023, 10028, 10047)
STORE_FAILED = 10077
NOT_NOW = (503, 10004, 10005, 10008, 10009, 10118, 10119, 10194, 10195)
"""What a cluster says that has no leader, or too few servers: of itself, of a stream, of a consumer."""

NO_JETSTREAM = "the server has no JetStream for us: start it with -js, or enable it for this account"


class Refusal(Exception):
    """JetStream's own word: a number and a text."""

    def __init__(self, number: int, text: str) -> None:
        self.number, self.text = number, text
        super().__init__(f"{text} ({number})")


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Failed(msgspec.Struct):
    error: _Error | None = None


_failed = msgspec.json.Decoder(_Failed).decode


def refusal_in(answer: bytes) -> Refusal | None:
    """The error that an answer is; None: it is none."""
    if b'"error"' not in answer:
        return None
    error = _failed(answer).error
    return None if error is None else Refusal(error.err_code or error.code, error.description)


async def call(line: Line, subject: str, question: Any, timeout: float) -> Any:
    """One question; the answer's JSON.

    :raises Refusal: JetStream says no.
    :raises BrokerUnavailable, BrokerRefused: it cannot be asked.
    """
    payload = b"" if question is None else msgspec.json.encode(question)
    try:
        answer, _ = await ask(line, f"$JS.API.{subject}", payload, timeout)
    except NobodyThereError:
        raise _absent(line) from None
    refusal = refusal_in(answer)
    if refusal is not None:
        if refusal.number in NOT_ENABLED:
            raise _absent(line)
        raise refusal
    return msgspec.json.decode(answer)


def _absent(line: Line) -> BrokerError:
    """Where JetStream was there before, the server is beginning, or ending."""
    return BrokerUnavailable("JetStream is not there now") if line.proven else BrokerRefused(NO_JETSTREAM)


def as_ours(refusal: Refusal, what: str) -> BrokerError:
    """What it means to whoever wanted `what`, in one line."""
    if refusal.number in NOT_ENABLED:
        return BrokerRefused(NO_JETSTREAM)
    if refusal.number in NO_ROOM or is_full(refusal):
        return StorageFull(f"{what}: the server has no room: {refusal}")
    if refusal.number == OVERLAPS:
        return BrokerRefused(
            f"{what}: a stream of somebody else takes our subjects: {refusal}; name another space in the URL's path"
        )
    if refusal.number in NOT_NOW:
        return BrokerUnavailable(f"{what}: {refusal}")
    return BrokerRefused(f"{what}: {refusal}")


def is_full(refusal: Refusal) -> bool:
    """Whether a store has no room for bytes, on its disk or by its limits."""
    text = refusal.text.lower()
    return "maximum bytes" in text or "no space left" in text or "insufficient" in text or "resource" in text


def publish_error(refusal: Refusal, subject: str) -> PublishError:
    if refusal.number in NO_ROOM or is_full(refusal):
        return StorageFull(f"the server has no room: {refusal}")
    return PublishError(f"the server refused a message for {subject}: {refusal}")


class Consumer(NamedTuple):
    """What matters of a queue's consumer."""

    ack_wait: float  # seconds
    pending: int
    held: int
    waiting: int
    delivered: int
    """The last place that was handed out."""
    floor: int
    """The last place up to which everything is acknowledged."""
    made: str
    """When; another time is another consumer."""


def _consumer(answer: Any) -> Consumer:
    config = answer["config"]
    return Consumer(
        config["ack_wait"] / 1e9,
        answer["num_pending"],
        answer["num_ack_pending"],
        answer["num_waiting"],
        answer["delivered"]["stream_seq"],
        answer["ack_floor"]["stream_seq"],
        answer["created"],
    )


class Api:
    """Over one line."""

    def __init__(self, line: Line, timeout: float) -> None:
        self.line = line
        self._timeout = timeout

    async def ask(self, subject: str, question: Any = None) -> Any:
        """:raises Refusal, BrokerUnavailable, BrokerRefused: see `call`."""
        return await call(self.line, subject, question, self._timeout)

    async def check(self) -> None:
        """:raises BrokerRefused: there is no JetStream for this user."""
        try:
            await self.ask("INFO")
        except Refusal as refusal:
            raise as_ours(refusal, "JetStream") from None

    async def make_stream(self, **config: Any) -> bool:
        """Have one of that name, alike or not; False: it was there.

        It is looked for first: in a cluster whoever leads it says so, where making one needs the leader of all.

        :raises Refusal: it cannot be made.
        """
        name, wanted = config["name"], config["num_replicas"]
        found = await self.stream(name)
        if found is None:
            config = {"storage": "file", "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_age": 0, **config}
            try:
                return bool((await self.ask(f"STREAM.CREATE.{name}", config)).get("did_create"))
            except Refusal:
                if await self.stream(name) is None:
                    raise
        elif found["config"]["num_replicas"] < wanted and not self.line.proven:
            has = found["config"]["num_replicas"]
            log.warning("stream %s exists with %d replicas and is used as it is, not with %d", name, has, wanted)
        return False

    async def stream(self, name: str, **question: Any) -> Any:
        """Its config and state; None: there is none."""
        try:
            return await self.ask(f"STREAM.INFO.{name}", question or None)
        except Refusal as refusal:
            if refusal.number in NOT_FOUND:
                return None
            raise

    async def subjects(self, stream: str, pattern: str) -> list[str]:
        """Those of a stream's subjects that hold a message."""
        found = await self.stream(stream, subjects_filter=pattern)
        return list((found or {}).get("state", {}).get("subjects") or ())

    async def consumer(self, stream: str) -> Consumer | None:
        """None: there is none."""
        try:
            return _consumer(await self.ask(f"CONSUMER.INFO.{stream}.{CONSUMER}"))
        except Refusal as refusal:
            if refusal.number in NOT_FOUND:
                return None
            raise

    async def make_consumer(self, stream: str, ack_wait: float) -> Consumer:
        """The queue's consumer with this lease in seconds, made or changed."""
        config = {
            "durable_name": CONSUMER,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": round(ack_wait * 1e9),
            "max_deliver": -1,
            "max_ack_pending": -1,
            "max_waiting": 8192,
            "replay_policy": "instant",
        }
        question = {"stream_name": stream, "config": config}
        return _consumer(await self.ask(f"CONSUMER.DURABLE.CREATE.{stream}.{CONSUMER}", question))

    async def end_consumer(self, stream: str) -> None:
        try:
            await self.ask(f"CONSUMER.DELETE.{stream}.{CONSUMER}")
        except Refusal as refusal:
            if refusal.number not in NOT_FOUND:  # as it may be when it is asked again
                raise

    async def message(self, stream: str, **question: Any) -> Message | None:
        """One stored message: `seq=`, `last_by_subj=` or both of `seq=`, `next_by_subj=`; None: there is none."""
        try:
            found = (await self.ask(f"STREAM.MSG.GET.{stream}", question))["message"]
        except Refusal as refusal:
            if refusal.number in NOT_FOUND:
                return None
            raise
        return Message(
            found["subject"],
            found["seq"],
            base64.b64decode(found.get("data", "")),
            base64.b64decode(found["hdrs"]) if "hdrs" in found else None,
            found.get("time", ""),
        )

    async def messages(self, stream: str, questions: Sequence[dict[str, Any]]) -> list[Message | None]:
        """Several at once."""
        return list(await asyncio.gather(*(self.message(stream, **one) for one in questions)))


class Message(NamedTuple):
    """A stored message, looked at and not taken."""

    subject: str
    seq: int
    body: bytes
    block: bytes | None
    time: str

    @property
    def stamp(self) -> str:
        """When it was stored, in nanoseconds."""
        whole, _, rest = self.time.removesuffix("Z").partition(".")
        return f"{int(datetime.fromisoformat(f'{whole}+00:00').timestamp())}{rest.ljust(9, '0')}"
