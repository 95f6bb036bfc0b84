"""Elections on a store: one holder at a time, and each with a higher epoch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from penstock.clock import SystemClock
from penstock.errors import BrokerUnavailable
from penstock.stores.base import Change, Delete, Entry, Store
from penstock.stores.election import MARGIN, STEPS, Election, Term
from penstock.testing.stores.harness import Place, StorePromises

LONG = 60.0  # seconds; a term that does not end within a test


class Line:
    """A store at the end of a line that can be cut."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._up = asyncio.Event()
        self._up.set()
        self.away = False
        """Every call fails."""
        self.deaf = 0
        """So many changes are made and not answered."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def cut(self) -> None:
        """From now on nothing is answered, and nothing fails."""
        self._up.clear()

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        await self._pass()
        return await self._store.get(keys)

    async def apply(self, changes: Sequence[Change]) -> list[int | None]:
        await self._pass()
        versions = await self._store.apply(changes)
        if self.deaf:
            self.deaf -= 1
            raise BrokerUnavailable("the answer was lost")
        return versions

    async def _pass(self) -> None:
        await self._up.wait()
        if self.away:
            raise BrokerUnavailable("the store is away")


class Ledger:
    """When an office was held, and with which epoch."""

    def __init__(self) -> None:
        self.begun: list[tuple[float, int]] = []
        self.ended: list[tuple[float, int]] = []

    async def hold(self, term: Term, seconds: float | None = None) -> None:
        """Hold it for a time, or for ever."""
        assert term.held
        self.begun.append((time.monotonic(), term.epoch))
        try:
            await asyncio.sleep(3600 if seconds is None else seconds)
        finally:
            self.ended.append((time.monotonic(), term.epoch))

    def check(self) -> None:
        """One after another, each with a higher epoch."""
        assert [epoch for _, epoch in self.begun] == sorted({epoch for _, epoch in self.begun})
        for (end, ended), (begin, begun) in zip(self.ended, self.begun[1:], strict=False):
            assert ended < begun
            assert end <= begin, f"epoch {begun} began {end - begin:.3f} s before {ended} had ended"


class ElectionPromises(StorePromises):
    async def test_all_who_stand_hold_it_one_after_another(self, place: Place, store: Store) -> None:
        ledger = Ledger()
        elections = [Election(await place.connect(), "it", term=LONG) for _ in range(5)]
        async with asyncio.timeout(place.harness.patience):
            await asyncio.gather(*(one.run(lambda term: ledger.hold(term, 0.02)) for one in elections))
        ledger.check()
        assert len(ledger.begun) == 5
        assert await elections[0].holder() is None

    async def test_offices_are_each_their_own(self, place: Place, store: Store) -> None:
        ledger = Ledger()
        async with self._standing(place, store, ledger, LONG, "a"), self._standing(place, store, ledger, LONG, "b"):
            assert len(ledger.begun) == 2

    async def test_who_gives_up_is_followed_at_once(self, place: Place, store: Store) -> None:
        ledger = Ledger()
        async with self._standing(place, store, ledger, LONG) as first:
            holder = await Election(store, "it").holder()
            assert holder is not None
            assert holder.epoch == ledger.begun[0][1]
            second = asyncio.create_task(Election(await place.connect(), "it", term=LONG).run(ledger.hold))
            await asyncio.sleep(place.harness.quiet)
            assert len(ledger.begun) == 1
            first.cancel()
            await self._until(place, lambda: len(ledger.begun) == 2)
            second.cancel()
            await asyncio.wait([second])
        ledger.check()

    async def test_who_goes_silent_ends_before_another_begins(self, place: Place, store: Store) -> None:
        term, ledger = 6 * place.harness.brief, Ledger()
        line = Line(await place.connect())
        async with self._standing(place, line, ledger, term):
            second = asyncio.create_task(Election(await place.connect(), "it", term=term).run(ledger.hold))
            await asyncio.sleep(term * 1.2)
            assert len(ledger.begun) == 1
            cut = time.monotonic()
            line.cut()
            await self._until(place, lambda: len(ledger.begun) == 2)
            assert ledger.begun[1][0] - cut >= term * (1 - MARGIN - 1 / STEPS)
            second.cancel()
            await asyncio.wait([second])
        ledger.check()

    async def test_it_is_kept_while_the_store_is_away_for_less_than_a_term(self, place: Place, store: Store) -> None:
        term, ledger = 8 * place.harness.brief, Ledger()
        line = Line(store)
        async with self._standing(place, line, ledger, term):
            for _ in range(3):
                line.away = True
                await asyncio.sleep(term / 3)
                line.away = False
                await asyncio.sleep(term / 3)
            assert ledger.ended == []

    async def test_a_renewal_that_is_not_answered_is_no_loss(self, place: Place, store: Store) -> None:
        term, ledger = 6 * place.harness.brief, Ledger()
        line = Line(store)
        async with self._standing(place, line, ledger, term):
            line.deaf = 1
            await asyncio.sleep(2 * term)
            assert line.deaf == 0
            assert ledger.ended == []

    async def test_an_office_taken_without_hearing_of_it_is_taken_again(self, place: Place, store: Store) -> None:
        ledger = Ledger()
        line = Line(store)
        line.deaf = 1
        async with self._standing(place, line, ledger, 6 * place.harness.brief):
            assert len(ledger.begun) == 1

    async def test_who_was_paused_knows_it_at_once(self, place: Place, store: Store) -> None:
        clock, terms = _Clock(), list[Term]()

        async def hold(term: Term) -> None:
            terms.append(term)
            await asyncio.sleep(3600)

        standing = asyncio.create_task(Election(store, "it", term=LONG, clock=clock).run(hold))
        await self._until(place, lambda: bool(terms))
        assert terms[0].held
        clock.offset = LONG
        assert not terms[0].held
        standing.cancel()
        await asyncio.wait([standing])

    async def test_what_it_does_to_end_is_done_while_it_holds_it(self, place: Place, store: Store) -> None:
        ledger = Ledger()

        async def slow(term: Term) -> None:
            try:
                await ledger.hold(term)
            except asyncio.CancelledError:
                await asyncio.sleep(term_length * 1.5)
                ledger.ended[-1] = (time.monotonic(), term.epoch)
                raise

        term_length = 3 * place.harness.brief
        first = asyncio.create_task(Election(store, "it", term=term_length).run(slow))
        await self._until(place, lambda: bool(ledger.begun))
        second = asyncio.create_task(Election(await place.connect(), "it", term=term_length).run(ledger.hold))
        first.cancel()
        await self._until(place, lambda: len(ledger.begun) == 2)
        assert first.done()
        second.cancel()
        await asyncio.wait([first, second])
        ledger.check()

    async def test_what_ends_or_fails_gives_it_up(self, place: Place, store: Store) -> None:
        async def fail(term: Term) -> None:
            raise ValueError(f"epoch {term.epoch}")

        election = Election(store, "it", term=LONG)
        epochs = []
        for _ in range(3):
            try:
                await election.run(fail)
            except ValueError as error:
                epochs.append(int(str(error).removeprefix("epoch ")))
            assert await election.holder() is None
        assert epochs == sorted(set(epochs))
        assert len(epochs) == 3

    async def test_a_store_that_forgets_gives_no_epoch_again(self, place: Place, store: Store) -> None:
        term, ledger = 6 * place.harness.brief, Ledger()
        async with self._standing(place, store, ledger, term):
            second = asyncio.create_task(Election(await place.connect(), "it", term=term).run(ledger.hold))
            await asyncio.sleep(term)  # it has seen who holds it
            assert len(ledger.begun) == 1
            await store.apply([Delete("office/it")])
            await self._until(place, lambda: len(ledger.begun) == 2)
            second.cancel()
            await asyncio.wait([second])
        ledger.check()

    @contextlib.asynccontextmanager
    async def _standing(
        self, place: Place, store: Any, ledger: Ledger, term: float, name: str = "it"
    ) -> AsyncIterator[asyncio.Task[None]]:
        """Somebody who holds an office from now on."""
        before = len(ledger.begun)
        standing = asyncio.create_task(Election(store, name, term=term).run(ledger.hold))
        try:
            await self._until(place, lambda: len(ledger.begun) > before)
            yield standing
        finally:
            standing.cancel()
            await asyncio.wait([standing])

    async def _until(self, place: Place, condition: Any) -> None:
        until = time.monotonic() + place.harness.patience
        while not condition():
            assert time.monotonic() < until, "nobody holds the office"
            await asyncio.sleep(0.005)


class _Clock(SystemClock):
    offset = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.offset
