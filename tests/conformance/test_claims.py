"""`Claims`: what was asked for is had once, whoever is cancelled, and not by a life that is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from penstock.brokers.base import Ack
from penstock.brokers.claims import Claimed, Claims
from penstock.message import Delivery

Answer = asyncio.Future[Claimed | None]


def delivery(token: int) -> Delivery:
    return Delivery("work", f"m{token}", "work", b"", {}, None, 0, 0.0, None, 0, token)


class Asking:
    """A system that answers when it is told to."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []

    def __call__(self) -> Answer:
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]

    def answer(self, *tokens: int) -> None:
        self.answers[-1].set_result(Claimed([delivery(token) for token in tokens], None))


@pytest.fixture
def lost() -> list[Delivery]:
    return []


@pytest.fixture
def claims(lost: list[Delivery]) -> Claims:
    return Claims(3, lost.extend)


async def begun(claims: Claims, room: int, ask: Callable[[], Answer]) -> asyncio.Task[Claimed | None]:
    """A `take` that waits for its answer."""
    taking = asyncio.create_task(claims.take(room, ask))
    await asyncio.sleep(0)
    return taking


async def cancelled(taking: asyncio.Task[Claimed | None]) -> None:
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking


def tokens(claimed: Claimed | None) -> Sequence[int]:
    assert claimed is not None
    return [one.token for one in claimed.deliveries]


async def test_what_a_cancelled_call_asked_for_comes_with_the_next_ones(claims: Claims) -> None:
    ask = Asking()
    await cancelled(await begun(claims, 3, ask))
    taking = await begun(claims, 1, ask)
    ask.answer(1, 2, 3)
    assert tokens(await taking) == [1]
    assert claims.room == 2
    assert [tokens(await claims.take(1, ask)), tokens(await claims.take(5, ask))] == [[2], [3]]
    assert claims.room == 0
    assert len(ask.answers) == 1


async def test_a_call_that_is_cancelled_as_its_answer_comes_in_loses_nothing(claims: Claims) -> None:
    ask = Asking()
    taking = await begun(claims, 3, ask)
    ask.answer(1, 2)
    await cancelled(taking)
    assert sorted(claims.held) == [1, 2]
    assert claims.room == 3
    assert tokens(await claims.take(3, ask)) == [1, 2]


async def test_nothing_is_held_of_what_a_life_that_is_over_had_asked_for(claims: Claims, lost: list[Delivery]) -> None:
    ask = Asking()
    taking = await begun(claims, 1, ask)
    ask.answer(1)
    held = tokens(await taking)
    waiting, before = await begun(claims, 1, ask), ask.answers[-1]
    claims.lose()
    assert [(one.token, one.lost) for one in lost] == [(token, True) for token in held]
    again = await begun(claims, 1, ask)
    before.set_result(Claimed([delivery(2)], None))
    assert tokens(await waiting) == []
    assert not claims.held
    await cancelled(again)
    again = await begun(claims, 1, ask)
    assert len(ask.answers) == 3
    ask.answer(3)
    assert tokens(await again) == [3]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_what_comes_in_after_the_end_is_not_held(claims: Claims, is_cancelled: bool) -> None:
    ask = Asking()
    taking = await begun(claims, 1, ask)
    claims.drop()
    ask.answer(1)
    if is_cancelled:
        await cancelled(taking)
    else:
        assert tokens(await taking) == []
    assert not claims.held


async def test_an_error_is_told_once_and_asked_again_after(claims: Claims) -> None:
    ask = Asking()
    taking = await begun(claims, 1, ask)
    ask.answers[-1].set_exception(ValueError("away"))
    with pytest.raises(ValueError, match="away"):
        await taking
    again = await begun(claims, 1, ask)
    ask.answers[-1].set_result(None)
    assert await again is None


async def test_what_is_settled_makes_room_and_leaves_in_hand_what_came_again(claims: Claims) -> None:
    ask = Asking()
    taking = await begun(claims, 3, ask)
    ask.answer(1, 2, 3)
    first, *others = (await taking or Claimed([], None)).deliveries
    assert claims.settled([Ack(first)])
    assert not claims.settled([Ack(others[0])])
    again = claims.held[3] = delivery(3)
    assert claims.ours([Ack(others[1]), Ack(again)]) == [Ack(again)]
    assert not claims.settled([Ack(others[1])])
    assert claims.held == {3: again}
