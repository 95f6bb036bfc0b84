"""Playing a seed from beginning to end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

from penstock.testing.simulation.ground import Ground
from penstock.testing.simulation.world import World
from penstock.testing.virtual import VirtualLoop

G = TypeVar("G", bound=Ground)


def simulate(seed: int) -> World:
    """Play one seed of the world of routes; the world afterwards.

    :raises Violation: a promise was broken; says how to replay it.
    """
    return play(World, seed)


def play(kind: Callable[[int, VirtualLoop], G], seed: int) -> G:
    """Play one seed of a kind of world; the world afterwards.

    :raises Violation: a promise was broken; says how to replay it.
    """
    with _nothing_collected():
        return _play(kind, seed)


def _play(kind: Callable[[int, VirtualLoop], G], seed: int) -> G:
    loop = VirtualLoop()
    world = kind(seed, loop)
    loop.set_task_factory(world.make_task)
    failures: list[BaseException] = []
    loop.set_exception_handler(lambda _, about: failures.append(about.get("exception") or RuntimeError(str(about))))
    try:
        asyncio.set_event_loop(loop)
        playing = loop.create_task(world.play())
        watching = loop.create_task(_watch(world, playing, failures))
        loop.run_until_complete(watching)
        return world
    finally:
        for process in world.processes:
            process.life.alive = False
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.set_exception_handler(lambda *_: None)
        loop.run_until_complete(asyncio.sleep(0))
        world.clean_up()
        asyncio.set_event_loop(None)
        loop.close()


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Without the garbage collector: it would dispose of suspended coroutines, of this seed or of one before, whenever
    it likes, and what they do then (`finally`) would make another story of the same seed."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


async def _watch(world: Ground, playing: asyncio.Task[None], failures: list[BaseException]) -> None:
    """The world's end, the first violation, or the first error that came out of a task nobody awaits."""
    while not playing.done() and not failures and world.violation is None:
        await asyncio.wait([playing], timeout=0.25)
    if world.violation is not None:
        raise world.violation
    if failures:
        raise failures[0]
    await playing
