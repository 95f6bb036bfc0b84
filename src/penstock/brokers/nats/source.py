"""`Source`: where a consumer gets the messages of one queue, by asking for so many at a time.

The server remembers one question at a time of ours and sends what comes until it is answered, so that nobody polls.
A question is good for half the lease: a consumer that turns no more has none open when its messages go to others, and
what it finds on its line when it turns again is not taken for new. It is good for so many bytes, too: what is on its
way to a slow consumer is bounded, or the server would cut the line.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from penstock.brokers.nats import wire
from penstock.brokers.nats.api import Api, Consumer, Refusal
from penstock.brokers.nats.line import Line
from penstock.brokers.nats.names import Names
from penstock.errors import BrokerRefused
from penstock.message import Delivery

log = logging.getLogger("penstock.nats")

DEFAULT_LEASE = 30.0
"""Seconds, of a queue that nobody has consumed yet."""
LONGEST = 30.0
"""Seconds for which one question is good."""
LATE = 2.0
"""Seconds after its end, after which a question that the server did not close is taken for forgotten."""
PULSE = 2.0
"""Seconds between the server's signs that it still knows of a question."""
SILENT = 5.0
"""Seconds without one, after which whoever leads the consumer in a cluster is taken for dead."""
LONGEST_WORD = 0.5
"""Seconds to wait for the answer to a question that is answered at once."""
TOLD = 0.25
"""Seconds that those who hold messages have to tell the server so, before their lease becomes shorter."""
SURE = 5.0
"""Seconds in which a shorter lease that was told of is kept to, whatever the server says."""
MOST_BYTES = 2**20
"""Bytes that one question brings at most, or as much as one message may have."""
FRAMING = 64 * 1024
"""Bytes of subjects beside a message."""
REMAKE_AFTER = 0.25
"""Seconds before a queue is looked for again whose consumer the server has ended: it may still be deleting it."""
PATIENCE = 50
"""Looks at whether something is still on its way, when a question is withdrawn."""

Arrived = Callable[["Source", Delivery], None]
Ended = Callable[["Source"], None]


class Source:
    """Of one queue, on one line. Another line needs another source: `begin` again."""

    def __init__(self, names: Names, queue: str, share: int, arrived: Arrived, ended: Ended) -> None:
        self.queue = queue
        self.stream = names.stream(queue)
        self.share = share
        """How many messages may be held or asked for."""
        self.held = 0
        self.ack_wait = 30.0
        """The lease in seconds, as the server keeps it."""
        self.soon: float | None = None
        """A shorter one that is to come."""
        self._sure_until = 0.0  # of the monotonic clock
        self.doubts = 0
        """How often there was reason to think that what is held is in its place no more."""
        self.cleared = 0
        """Up to which of them it was looked at."""
        self.refusal: BrokerRefused | None = None
        """Why nothing may be asked for."""
        self._made = ""
        self.beaten = 0.0
        """When the last heartbeat was sent that the server has confirmed, of the monotonic clock."""
        self.asked = 0
        """Messages that the server may still send."""
        self._next = names.next(queue)
        self._arrived = arrived
        self._ended = ended
        self._line: Line | None = None
        self._sid = 0
        self._inbox = b""
        self.begin_at = 0.0
        """When it may begin again, of the monotonic clock."""
        self.mend_at = 0.0
        """When to look next at what a dead server may have left, of the monotonic clock."""
        self.pause_to_mend = 0.0
        self._line_before: Line | None = None
        self.resting = False
        """Nothing is asked for until somebody asks for it."""
        self._asked_at = 0.0  # of the monotonic clock
        self._until = 0.0  # of the monotonic clock
        self._most = 0  # bytes
        self._heard_at = 0.0  # of the monotonic clock
        self._turned = 0.0  # of the monotonic clock
        self._pulses = self._is_forgotten = False
        self._caught_up: asyncio.Future[Any] | None = None
        """Done when all is read that the server had sent before a question was missed."""
        self._heard_some = False
        self._word: asyncio.Future[int] | None = None

    @property
    def doubtful(self) -> bool:
        """Whether what is held must be looked for before it is settled."""
        return self.doubts != self.cleared

    def know(self, consumer: Consumer) -> None:
        """Take over what the server says of the consumer."""
        self.doubts += self._made not in ("", consumer.made)
        self._made = consumer.made
        sure = time.monotonic() < self._sure_until
        self.ack_wait = min(consumer.ack_wait, self.ack_wait) if sure else consumer.ack_wait

    def hasten(self) -> None:
        """Keep to the shorter lease that is to come."""
        if self.soon is not None:
            self.ack_wait = min(self.ack_wait, self.soon)
            self._sure_until = time.monotonic() + SURE
            self.soon = None

    def begin(self, line: Line, number: int) -> None:
        """Listen on this line from now on."""
        if line is not self._line_before:
            self._line_before = line
            self.pause_to_mend = 2 * self.ack_wait
            self.mend_at = time.monotonic() + self.pause_to_mend
        self.asked = 0
        self._most = max(MOST_BYTES, line.largest + FRAMING)
        self._line = line
        line.watch(self._next.decode(), self._refused)
        self._inbox = f"{line.inbox}.pull.{number}".encode()
        self._sid = line.listen(self._inbox.decode(), self._receive)

    def is_on(self, line: Line | None) -> bool:
        """Whether messages would come over this line."""
        return line is not None and line is self._line and not line.closed and not self.is_forgotten

    @property
    def is_forgotten(self) -> bool:
        """Whether the server should have closed the question by now, and has not, or nobody knows of it any more."""
        return self.asked > 0 and self._is_forgotten

    def turn(self) -> None:
        """For the consumer to call as it turns, at least each second: what was said while it stood still is not read
        yet. Nor is what comes behind a large message on a slow line: a question is forgotten when it is missed and all
        is read that the server had sent by then. A line that brings nothing any more ends by itself."""
        now = time.monotonic()
        if now - self._turned > PULSE:
            self._heard_at = now
        self._turned = now
        is_missed = now > self._until + LATE or (self._pulses and now - self._heard_at > SILENT)
        if not (self.asked and is_missed) or self._line is None or self._line.closed:
            self._caught_up, self._is_forgotten = None, False
        elif self._caught_up is None:
            self._caught_up = self._line.ping()
            self._caught_up.add_done_callback(lambda _: self._ended(self))
        else:
            self._is_forgotten = self._caught_up.done()

    def end(self) -> None:
        """It was the server that ended it: begin again."""
        self.doubts += 1
        line, self._line = self._line, None
        self.asked = 0
        self.begin_at = time.monotonic() + REMAKE_AFTER
        if line is not None and not line.closed:
            line.leave(self._sid)
            line.forget(self._sid)

    @property
    def room(self) -> int:
        return self.share - self.held - self.asked

    def ask(self, count: int, *, wait: float | None = None) -> None:
        """Have up to `count` messages sent, within half the lease; or those that are there within `wait` seconds, if
        that is less, as soon as there is one.

        :raises BrokerUnavailable: the connection has ended.
        """
        if count <= 0 or self._line is None or self.asked:
            return
        seconds = min(self.ack_wait / 2, LONGEST if wait is None else wait)
        question: dict[str, object] = {"batch": count, "max_bytes": self._most}
        if wait is not None:
            question["no_wait"] = True
        if seconds > 0:
            question["expires"] = max(round(seconds * 1e9), 1_000_000)
        if seconds > SILENT:  # a shorter one ends as soon
            question["idle_heartbeat"] = round(PULSE * 1e9)
        payload = msgspec.json.encode(question)
        self._line.write(b"PUB %b %b %d\r\n%b\r\n" % (self._next, self._inbox, len(payload), payload))
        self.asked = count
        self._heard_some = False
        self._asked_at = self._heard_at = time.monotonic()
        self._caught_up, self._is_forgotten = None, False
        self._pulses = seconds > SILENT
        self._until = self._asked_at + seconds

    def _receive(self, subject: bytes, ack: bytes, body: bytes, block: bytes | None) -> None:
        status = None if ack else wire.status_of(block)
        if status is not None:
            self._closed(*status)
            return
        self.asked -= self.asked > 0
        self._heard_some = True
        self._heard(0)
        now = self._heard_at = time.monotonic()
        if now - self._asked_at > self.ack_wait:
            return  # we stood still, and it has lain here: it is somebody else's by now
        at = now if now < self._until else self._asked_at
        delivery = wire.to_delivery(subject, body, block, self.queue, self, ack, at)
        self.held += 1
        self._arrived(self, delivery)

    def _closed(self, code: int, text: str) -> None:
        """The server sends no more for this question."""
        self._heard_at = time.monotonic()
        if code == 100 or self._heard(code if code == 404 or "Requests Pending" in text else 0):
            return  # a heartbeat, or about what was asked only to hear something
        self.asked = 0
        if "MaxBytes" in text:
            self._most = self._most if self._heard_some else 2 * self._most
        elif code == 503 or (code == 409 and ("Deleted" in text or "push" in text)):
            log.warning("queue %r: the server ended its consumer (%s): consuming it again", self.queue, text)
            self.end()
        elif code == 409 and "Leadership" not in text:
            log.warning("queue %r: the server does not send: %s", self.queue, text)
        self._ended(self)

    def _refused(self, refusal: BrokerRefused) -> None:
        self.refusal = refusal
        self.asked = 0
        self._ended(self)

    # -- withdrawing

    async def withdraw(self, timeout: float) -> None:
        """Ask for nothing any more, and have all that was sent: what comes later comes to nobody.

        :raises BrokerUnavailable: the connection has ended.
        """
        line = self._line
        if line is None or line.closed:
            return
        looks = 0
        while self.asked and looks < PATIENCE and await self._is_on_its_way(line):
            looks += 1
            await asyncio.sleep(0.002)
        asked = self.asked > 0
        line.leave(self._sid)
        try:
            await line.flush(timeout)
            if asked:
                # Asked for its state, a server looks who still listens. Else it may find out with a message in its
                # hands that was given back, and would then keep that for the whole lease (seen on 2.9.10).
                await Api(line, timeout).consumer(self.stream)
        except Refusal as refusal:
            log.debug("queue %r: %s", self.queue, refusal)
        finally:
            line.forget(self._sid)
            self._line = None
            self.asked = 0

    async def _is_on_its_way(self, line: Line) -> bool:
        """The server says that there is no message only after it has sent what it had for those who asked before."""
        self._word = word = asyncio.get_running_loop().create_future()
        question = b'{"batch":1,"no_wait":true}'
        line.write(b"PUB %b %b %d\r\n%b\r\n" % (self._next, self._inbox, len(question), question))
        await asyncio.wait({word}, timeout=LONGEST_WORD)
        self._word = None
        return not word.done() or word.result() != 404

    def _heard(self, code: int) -> bool:
        """Whether it is what a withdrawal waits for: a code that answers its question, or 0 for anything else."""
        word = self._word
        if word is not None and not word.done():
            word.set_result(code)
        return word is not None and code != 0


async def join(api: Api, stream: str, lease: float | None, tell: Callable[[float], None]) -> Consumer | None:
    """Make sure of a queue's consumer; None: there is no such queue.

    The shortest lease of those who use it is kept, as long as somebody uses it; `tell(lease)` says so to those who
    hold something before it is shorter. With a lease of None it is used as it is.

    :raises Refusal, BrokerUnavailable, BrokerRefused: it cannot be asked.
    """
    found = await mend(api, stream)
    if found is None:
        if await api.stream(stream) is None:
            return None
        return await api.make_consumer(stream, DEFAULT_LEASE if lease is None else lease)
    unused = not (found.waiting or found.held)
    if lease is None or lease == found.ack_wait or (found.ack_wait < lease and not unused):
        return found
    if found.ack_wait > lease and not unused:
        tell(lease)
        await asyncio.sleep(TOLD)
    return await api.make_consumer(stream, lease)


async def mend(api: Api, stream: str) -> Consumer | None:
    """Put right what the sudden death of a server leaves behind; the consumer, if there is one.

    A server that is killed may remember that a message was acknowledged and have it all the same (seen on 2.9.10;
    newer ones look for that themselves): nobody would get it, and it would stay for ever. One whose machine has died
    may have lost messages that the consumer has had: new ones would take their places and be passed over.
    """
    consumer, state = await _look(api, stream)
    if consumer is not None and state is not None and consumer.delivered > state["last_seq"]:
        await asyncio.sleep(LATE)
        consumer, state = await _look(api, stream)
    if consumer is None or state is None:
        return consumer
    if consumer.delivered > state["last_seq"]:
        log.error("%s: the server has lost messages that it had confirmed: its consumer is made again", stream)
        await api.end_consumer(stream)
        return await api.make_consumer(stream, consumer.ack_wait)
    # With nothing in anybody's hands all that was delivered is done, wherever the server's count of it stands.
    settled = consumer.floor if consumer.held else max(consumer.floor, consumer.delivered)
    if state["messages"] and state["first_seq"] <= settled:
        done = await api.ask(f"STREAM.PURGE.{stream}", {"seq": settled + 1})
        log.info("%s: removed %s messages that were acknowledged before the server was killed", stream, done["purged"])
    return consumer


async def _look(api: Api, stream: str) -> tuple[Consumer | None, dict[str, Any] | None]:
    """The consumer first: what it has had is in the stream by the time that is looked at."""
    consumer = await api.consumer(stream)
    found = None if consumer is None else await api.stream(stream)
    return consumer, None if found is None else found["state"]
