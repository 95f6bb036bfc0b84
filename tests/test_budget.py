"""What a message may cost: calls of functions, Python's and C's, counted on the memory broker in virtual time.

Counts do not depend on the machine or its load, so a change that makes the path dearer is seen at
once. Each is taken in an interpreter of its own with the garbage collector off: what other tests left
behind is finalized, and counted, whenever a collection happens to fall into the measurement.

The budget is at most some five per cent above what was counted when it was written; lower it when the
path gets cheaper. `python -m tests.test_budget NAME` prints one count.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from penstock.brokers.memory import MemoryBroker, MemoryServer
from penstock.delivery.arguments import bind
from penstock.delivery.consumer import Consumer, queues_of
from penstock.delivery.route import Policy, Route
from penstock.delivery.surroundings import Surroundings
from penstock.delivery.suspects import Solitude
from penstock.message import Message, Outgoing
from penstock.testing.virtual import VirtualClock, VirtualLoop, run_virtual

ROOT = Path(__file__).parent.parent
MESSAGES = 4_000

BUDGET = {"one at a time": 40.0, "bulk 100": 25.6}


async def one_at_a_time(message: Message) -> None: ...


async def bulk(messages: list[Message]) -> None: ...


def calls_per_message(handler: Callable[..., Any], policy: Policy) -> float:
    """From receiving to the last settlement, everything in the event loop included."""

    async def main(loop: VirtualLoop) -> float:
        server = MemoryServer(VirtualClock(loop))
        route = Route(
            name="handler",
            queues=("q",),
            topics=(),
            handler=handler,
            binding=bind(handler),
            policy=policy,
            broker=None,
            vhost=None,
            prefetch=256,
        )
        for queue in queues_of(route):
            server.declare("", queue)
        headers = {"content-type": "application/json"}
        for number in range(MESSAGES):
            server.publish("", [Outgoing(id=str(number), topic="q", body=b'{"n": 1}', headers=headers)])
        around = Surroundings(solitude=Solitude(), clock=server.clock)
        consumer = Consumer(route, MemoryBroker(server=server), around, lambda error: None)
        calls = 0

        def count(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        await consumer.start()
        sys.setprofile(count)
        while server.records:
            await asyncio.sleep(0)
        sys.setprofile(None)
        await consumer.stop(1)
        return calls / MESSAGES

    result: float = run_virtual(main)
    return result


WORKLOADS: dict[str, tuple[Callable[..., Any], Policy]] = {
    "one at a time": (one_at_a_time, Policy(concurrency=100)),
    "bulk 100": (bulk, Policy(bulk_size=100)),
}


def counted_alone(name: str) -> float:
    """The count of one workload, in an interpreter of its own."""
    command = [sys.executable, "-m", "tests.test_budget", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_message_stays_within_its_budget(name: str) -> None:
    counted = counted_alone(name)
    print(f"{name}: {counted:.2f} calls a message, budget {BUDGET[name]}")
    assert counted <= BUDGET[name]
    assert counted > BUDGET[name] * 0.7, "far below its budget: lower the budget"


def test_the_count_is_the_same_each_time() -> None:
    assert counted_alone("bulk 100") == counted_alone("bulk 100")


if __name__ == "__main__":
    gc.disable()
    print(calls_per_message(*WORKLOADS[sys.argv[1]]))
