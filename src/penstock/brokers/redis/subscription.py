"""A consumer of some queues, kept alive by heartbeats from the event loop that consumes."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from penstock.brokers.base import Ack, Move, OnLost, Settlement
from penstock.brokers.claims import Claimed, Claims, under_way
from penstock.brokers.redis import lua, wire
from penstock.errors import BrokerError
from penstock.message import Delivery
from penstock.redis.line import Word
from penstock.waiting import Bell

if TYPE_CHECKING:
    from penstock.brokers.redis.broker import RedisBroker

log = logging.getLogger("penstock.redis")

MAX_CLAIM_BYTES = 32 * 2**20  # of bodies in one answer
MAX_MOVES = 500  # that one script carries out, so that others are served in between
LEAVE_WITHIN = 5.0  # seconds for a last word
SHORTEST_PATIENCE = 1.0  # seconds for which a heartbeat is waited for, however short the lease
SOON = 0.001  # seconds added to a time that the server tells, for the way there


class RedisSubscription:
    """One life after another of a consumer. All it holds is taken from it together, when it has been silent for
    its lease: one look at whether it still lives fences every settlement."""

    def __init__(
        self,
        broker: RedisBroker,
        names: Sequence[str],
        prefetch: int,
        lease: float,
        on_lost: OnLost,
        closed: Callable[[RedisSubscription], None],
    ) -> None:
        self._forget = closed
        self._broker = broker
        self._names = tuple(names)
        self._lease = lease
        self._claims = Claims(prefetch, on_lost)
        self._held: dict[wire.Place, Delivery] = self._claims.held
        self._consumer: str | None = None
        self._joining: asyncio.Future[str] | None = None
        self._unsure = False
        """Whether a claim may have been carried out whose answer got lost."""
        self._recalled = 0
        """The connection on which what the server says that we hold was last compared."""
        self._recalls = 0
        self._bereft = False
        """Whether the server has forgotten us: then perhaps our queues too."""
        self._bell: Bell | None = None
        self._beating: asyncio.Task[None] | None = None
        self._next_look = 0.0
        self._turn = 0
        self._closed = False

    @property
    def consuming(self) -> bool:
        broker = self._broker
        return self._consumer is not None and not self._closed and broker.link.up and broker.listening.up

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        while not self._closed:
            if self._consumer is None:
                await self._join()
            room = min(limit, self._claims.room)
            upcoming: float | None = None
            if room > 0:
                taken, upcoming = await self._take(room)
                if taken:
                    return taken
            left = until - loop.time()
            if left <= 0:
                break
            await self._bell.wait(left if upcoming is None else min(left, upcoming + SOON))
        return []

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
        consumer = self._consumer
        ours = self._claims.ours(items)
        done = True
        if ours and consumer is not None:  # closed: nothing is ours
            done = await self._carry_out(consumer, ours)
            if done:
                if self._claims.settled(ours):
                    self._ring()
            elif self._consumer == consumer:
                self._given_up()
        if done and len(ours) == len(items):
            return []
        settled = set(map(id, ours)) if done else set()
        return [item.delivery for item in items if id(item) not in settled]

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._beating is not None:
            self._beating.cancel()
        self._broker.listening.unsubscribe(self._channels(), self)
        self._ring()
        self._claims.drop()
        joining = self._joining
        try:
            async with asyncio.timeout(LEAVE_WITHIN):
                consumer = self._consumer
                if joining is not None:  # `receive` was just beginning
                    consumer = await asyncio.shield(joining)
                if consumer is not None:
                    await self._broker.run(lua.LEAVE, consumer)
        except (BrokerError, TimeoutError) as error:
            log.warning("could not release what was held, it will be taken over: %s", str(error) or "no answer")
        finally:
            if joining is not None:
                joining.cancel()
                self._broker.listening.unsubscribe(self._channels(), self)
            self._forget(self)

    # -- called by `Listening`

    def heard(self, channel: bytes, data: bytes) -> None:
        self._ring()

    def missed(self, back: bool) -> None:
        self._ring()

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    def _channels(self) -> list[str]:
        return [f"{self._broker.channels}wake:{name}" for name in self._names]

    # -- joining and staying

    async def _join(self) -> None:
        if self._joining is None:
            self._joining = under_way(self._enter())
        try:
            consumer = await asyncio.shield(self._joining)  # cancelled, it stays under way for the next call
        except Exception:
            self._joining = None
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                return  # `close` waited for it in vain
            raise
        if self._closed:
            return  # `close` has seen to it
        self._joining = None
        self._consumer = consumer
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat(), name="penstock-heartbeat")

    async def _enter(self) -> str:
        """Become a consumer; under which name.

        :raises BrokerError: a queue is not declared.
        """
        await self._broker.listening.subscribe(self._channels(), self)
        if self._bereft:
            await self._broker.declare_again()
            self._bereft = False
        consumer = secrets.token_hex(8)
        while isinstance(said := await self._broker.run(lua.JOIN, consumer, self._lease, *self._names), bytes):
            if not await self._broker.declare_again(said.decode()):
                raise BrokerError(f"cannot consume {said.decode()!r}: it is not declared")
        assert isinstance(said, list)
        self._look_in(float(said[0]))
        self._unsure = False
        self._recalled = self._broker.link.generation
        return consumer

    def _look_in(self, seconds: float) -> None:
        """Beat again then, or a third of the lease from now if that is sooner."""
        self._next_look = asyncio.get_running_loop().time() + min(seconds + SOON, self._lease / 3)

    async def _beat(self) -> None:
        """Say that this loop turns, and take over from consumers that are silent."""
        loop = asyncio.get_running_loop()
        complaint = ""
        while True:
            await asyncio.sleep(max(self._next_look - loop.time(), 0))
            self._look_in(self._lease / 3)
            consumer = self._consumer
            if consumer is None:
                continue
            patience = max(self._lease / 3, SHORTEST_PATIENCE)
            try:
                async with asyncio.timeout(patience):
                    said = await self._broker.run(lua.BEAT, consumer, self._lease)
            except TimeoutError:
                self._broker.link.doubt(patience * 0.9)
                self._look_in(0)
                continue
            except BrokerError as error:
                if str(error) != complaint:
                    log.warning("no heartbeat: %s", error)
                complaint = str(error)
                self._ring()  # whoever waits hears of it too
                self._look_in(min(1.0, self._lease / 3))
                continue
            complaint = ""
            if self._recalled != self._broker.link.generation:
                self._ring()  # whoever waits compares what we hold
            if said is not None:
                assert isinstance(said, bytes)
                self._look_in(float(said))
            elif self._consumer == consumer:
                self._given_up()

    def _given_up(self) -> None:
        """We were silent for too long and everything we held has gone to others: begin a new life."""
        self._consumer = None
        self._bereft = True
        self._claims.lose()
        self._ring()

    # -- taking

    async def _take(self, room: int) -> Claimed:
        """Messages now in hand, or none and the seconds until a delay ends."""
        consumer = self._consumer
        if consumer is None:
            return Claimed([], None)
        claimed = await self._claims.take(room, lambda: under_way(self._claim(consumer, room)))
        if claimed is None:
            self._given_up()
            return Claimed([], None)
        return claimed

    async def _claim(self, consumer: str, room: int) -> Claimed | None:
        """What was found, and the seconds until a delay ends; None: given up for dead."""
        names, link = self._names, self._broker.link
        await link.line()
        if self._unsure or self._recalled != link.generation:
            generation = link.generation
            self._recalls += 1
            known = [place.entry + f" {place.stream}".encode() for place in self._held]
            said = await self._broker.run(lua.RECALL, consumer, self._recalls, len(names), *names, *known)
            if said is None:
                return None
            found = await self._found(consumer, names, said)
            self._unsure = False
            self._recalled = generation
            if found:
                return Claimed(found, None)
        self._turn = (self._turn + 1) % len(names)
        names = names[self._turn :] + names[: self._turn]
        try:
            said = await self._broker.run(lua.CLAIM, consumer, self._recalls, room, MAX_CLAIM_BYTES, *names)
            if said is None:
                return None
            assert isinstance(said, list)
            found = await self._found(consumer, names, said)
        except BaseException:
            self._unsure = True
            raise
        if len(said) > 1 and not found:
            return Claimed([], 0.0)  # there may be more behind those that were none
        return Claimed(found, float(said[0]) if said[0] else None)

    async def _found(self, consumer: str, names: Sequence[str], said: Any) -> list[Delivery]:
        """What is new to us in an answer of the server's; what nobody can read is removed there."""
        broken: list[wire.Place] = []
        found = list(wire.deliveries(names, said[1:], broken))
        known = self._held
        found = [one for one in found if one.token not in known]
        for place in broken:
            log.warning("entry %s of %s is no message, or is gone: removed", place.entry.decode(), place.stream)
            await self._broker.run(lua.ACK, consumer, place.stream, 1, place.entry)
        return found

    # -- settling

    async def _carry_out(self, consumer: str, items: Sequence[Settlement]) -> bool:
        """Whether we still counted as alive.

        :raises BrokerError: a queue to move to is not declared; then nothing was done.
        """
        acks: dict[str, list[bytes]] = {}
        others: list[Settlement] = []
        for item in items:
            place: wire.Place = item.delivery.token
            if type(item) is Ack and not place.keyed:
                acks.setdefault(place.stream, []).append(place.entry)
            else:
                others.append(item)
        alive = True
        for at in range(0, len(others), MAX_MOVES):
            verdicts = _verdicts(others[at : at + MAX_MOVES])
            while isinstance(said := await self._broker.run(lua.SETTLE, consumer, *verdicts), bytes):
                if not await self._broker.declare_again(said.decode()):
                    raise BrokerError(f"cannot move to {said.decode()!r}: it is not declared")
            alive = alive and said is not None
        if acks and alive:
            arguments: list[Word] = []
            for stream, entries in acks.items():
                arguments += (stream, len(entries), *entries)
            alive = await self._broker.run(lua.ACK, consumer, *arguments) is not None
        return alive


def _verdicts(items: Iterable[Settlement]) -> list[Word]:
    """As `lua.SETTLE` takes them, eleven words each."""
    words: list[Word] = []
    for item in items:
        place: wire.Place = item.delivery.token
        rank, _, name = place.stream.partition(":")
        if isinstance(item, Move):
            _, new_rank, delay, *rest = wire.stored(item.message)
            words += ("m", name, rank, place.entry, delay, item.to, new_rank, *rest)
        elif isinstance(item, Ack):
            words += ("a", name, rank, place.entry, 0, "", "", "", "", "", "")
        else:
            words += ("r", name, rank, place.entry, max(item.delay, 0), "", "", "", "", "", "")
    return words
