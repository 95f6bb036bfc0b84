"""Elections: of all who stand for an office, one holds it, and each holder has a higher epoch than those before.

The office is an entry of a store, which its holder keeps changing. Whoever has seen no change of it for a
whole term, by a clock of its own, takes it over by compare-and-set; no two clocks have to agree, only to run
equally fast, within a tenth. The holder counts from the moment at which it asked for its last renewal,
and gives up a tenth early: so it stops before another one begins. What cannot be stopped in time (its process
was paused in the middle of a write) is for the epoch to refuse.

An epoch is the version that the store gave to the entry when the office was taken: a store that was emptied, or
went back to an older state, still gives no version twice. Who sees an office vanish takes it to be held for a
whole term; who begins then, and has seen nothing, may begin before the holder has found its entry gone: within
a third of a term. Again the epoch tells them apart.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable

import msgspec

from penstock.clock import SYSTEM_CLOCK, Clock
from penstock.errors import BrokerUnavailable, one_line
from penstock.stores.base import ABSENT, Put, Store
from penstock.stores.following import Followers
from penstock.waiting import Bell

log = logging.getLogger("penstock.stores")

TERM = 6.0
"""Seconds after which the office of a holder that has gone silent is another's."""
STEPS = 3
"""Into which a term is divided: in each the holder renews once, and the others look once."""
MARGIN = 0.1
"""Of a term: by so much earlier than others may begin the holder ends."""


class Office(msgspec.Struct, frozen=True, array_like=True):
    """What is stored under `office/<name>`."""

    who: str
    """Empty: nobody; it was given up."""
    epoch: int
    """Of the holder; of the last one, if nobody holds it. 0: the entry's own version, for it was just taken."""


class Term:
    """An office while it is held here. `epoch` is higher than that of any holder before."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.epoch = 0
        self.until = 0.0
        """On the monotonic clock; put off by each renewal."""
        self._clock = clock

    @property
    def held(self) -> bool:
        """Whether it certainly is, now. To be asked right before anything that only the holder may do."""
        return self._clock.monotonic() < self.until


class Election:
    """Stands for an office. For one event loop; the store stays open."""

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        term: float = TERM,
        clock: Clock = SYSTEM_CLOCK,
        rng: random.Random | None = None,
        who: str | None = None,
    ) -> None:
        self._store = store
        self._name = name
        self._key = f"office/{name}"
        self._term = term
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - jitter
        self._who = who or f"{socket.gethostname()}:{os.getpid()}:{os.urandom(4).hex()}"
        self._version = ABSENT

    async def run(self, serve: Callable[[Term], Awaitable[None]]) -> None:
        """Stand for the office, run `serve` while it is held, and so on, until `serve` ends by itself.

        When the office is lost `serve` is cancelled, and awaited. When it ends, when it raises, or when this
        is cancelled, the office is given up, and another takes it at once.

        :raises BrokerRefused: the store is never going to work again.
        """
        while True:
            term = await self._elected()
            log.info("%s holds %s, epoch %d", self._who, self._name, term.epoch)
            serving = asyncio.ensure_future(serve(term))
            try:
                await self._keep(term, serving)
            except asyncio.CancelledError:
                serving.cancel()
                await self._keep(term, serving)  # while it ends nobody else may begin
                raise
            finally:
                lost = not serving.done()
                serving.cancel()
                await asyncio.wait([serving])
                await self._give_up(term)
            if not lost:
                return serving.result()
            log.warning("%s has lost %s, epoch %d", self._who, self._name, term.epoch)

    async def holder(self) -> Office | None:
        """Who holds the office, or has gone silent holding it; None: nobody.

        :raises BrokerUnavailable: the store is away.
        """
        office, _ = await self._look()
        return office if office.who else None

    # -- standing

    async def _elected(self) -> Term:
        """Until the office is ours."""
        followers = Followers(self._store)
        try:
            while True:
                try:
                    async with followers.follow([self._key]) as bell:
                        return await self._stand(bell)
                except BrokerUnavailable as error:
                    log.warning("cannot stand for %s: %s", self._name, one_line(error))
                await asyncio.sleep(self._step())
        finally:
            await followers.close()

    async def _stand(self, bell: Bell) -> Term:
        now = self._clock.monotonic
        seen, since, known = None, 0.0, False
        while True:
            office, version = await self._look()
            if version != seen:
                seen, since = version, now()
            vacant = not office.who and (version != ABSENT or not known)
            known = known or version != ABSENT
            # Ours without our knowing: the answer to the request that took it was lost.
            if vacant or office.who == self._who or now() - since >= self._term:
                term = Term(self._name, self._clock)
                if await self._write(term, version):
                    term.epoch = self._version
                    return term
                continue
            await bell.wait(min(self._step(), since + self._term - now()))

    # -- holding

    async def _keep(self, term: Term, serving: asyncio.Future[None]) -> None:
        """Renew until `serving` has ended, or the office is lost."""
        pause = self._term / STEPS
        while term.held:
            left = term.until - self._clock.monotonic()
            await asyncio.wait([serving], timeout=min(pause, left))
            if serving.done() or not term.held:
                return
            pause = self._term / STEPS
            try:
                async with asyncio.timeout(term.until - self._clock.monotonic()):
                    if not await self._write(term, self._version):
                        await self._see_who_has_it(term)
            except (BrokerUnavailable, TimeoutError) as error:
                log.warning("%s could not be renewed: %s", self._name, one_line(error))
                pause /= 4

    async def _see_who_has_it(self, term: Term) -> None:
        """The office is not as we left it: another has it, or a renewal was not answered."""
        office, version = await self._look()
        if office == Office(self._who, term.epoch):
            self._version = version
            await self._write(term, version)
        else:
            term.until = 0.0

    async def _give_up(self, term: Term) -> None:
        if not term.held:
            return
        term.until = 0.0
        vacant = Put(self._key, _encode(Office("", term.epoch)), expect=self._version, tell=True)
        try:
            await self._store.apply([vacant])
        except BrokerUnavailable as error:
            log.warning("%s is held until its term is over: %s", self._name, one_line(error))

    # -- the store

    async def _look(self) -> tuple[Office, int]:
        (entry,) = await self._store.get([self._key])
        if entry is None:
            return Office("", 0), ABSENT
        office = _decode(entry.value)
        return (office if office.epoch else Office(office.who, entry.version)), entry.version

    async def _write(self, term: Term, version: int) -> bool:
        """Take the office, or renew it; False: it is not as it was."""
        asked = self._clock.monotonic()
        (new,) = await self._store.apply([Put(self._key, _encode(Office(self._who, term.epoch)), expect=version)])
        if new is None:
            return False
        self._version = new
        term.until = asked + self._term * (1 - MARGIN)
        return True

    def _step(self) -> float:
        return self._term / STEPS * self._rng.uniform(0.5, 1.0)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Office).decode
