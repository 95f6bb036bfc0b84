"""`Consumer`: one route at work, from the broker to the handler and back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from penstock.brokers.base import Ack, Broker, Queue, Release, Subscription
from penstock.clock import backoff_delay
from penstock.context import current_message
from penstock.delivery import history
from penstock.delivery.batching import Batching, Buffer
from penstock.delivery.dead_letters import dead_queue
from penstock.delivery.execution import Executor
from penstock.delivery.history import History
from penstock.delivery.lookahead import LookAhead
from penstock.delivery.route import Route
from penstock.delivery.settlement import Outcome, Settler
from penstock.delivery.surroundings import Surroundings
from penstock.delivery.suspects import suspect_queue
from penstock.delivery.verdicts import Verdicts
from penstock.errors import BrokerError, BrokerRefused, InvalidMessage, Unavailable, one_line
from penstock.message import Decision, Delivery, Message
from penstock.options import Actions
from penstock.waiting import Bell, together

log = logging.getLogger("penstock.delivery")

LONGEST_PAUSE = 30.0  # seconds between looks whether what was away is back
RECEIVE_WAIT = 30.0  # seconds a receive may wait; only a bound, messages end it at once
LAST_WAIT = 2.0  # seconds for a cancelled handler call to end
LAST_SETTLING = 1.0  # seconds to settle what has ended, where the grace is over
MOST_PATIENCE = 16  # leases for which everything else may wait so that a suspect runs
SUSPECT_WAIT = 0.1  # seconds in which one that was just given back can be had again
SOLITARY_SECONDS = 1.0  # how long suspects may keep everything else waiting in one go
LONGEST_TURN = 0.05  # seconds of handler calls that never wait, before the event loop gets its turn

_DECISIONS = {Actions.ACK: Decision.ACCEPT, Actions.REJECT: Decision.REJECT, Actions.REQUEUE: Decision.RETRY}


def queues_of(route: Route) -> list[Queue]:
    """Every queue a route needs, in the order in which they are to be declared: where its dead letters go, its own, and
    the lanes of their suspects, each after the queue that it runs beside."""
    policy = route.policy
    limit = route.max_length
    own = [Queue(name, route.topics, policy.priorities, policy.ordered, max_length=limit) for name in route.queues]
    lanes = [Queue(suspect_queue(name), (), 0, policy.ordered, lane_of=name) for name in route.queues]
    dead = [Queue(dead_queue(name)) for name in route.queues]
    return dead + own + lanes


class Consumer:
    """Consumes the queues of a route on one broker until stopped.

    At most `route.prefetch` messages are in hand, that is received and not yet settled. `fatal` is
    called once with the error when consuming cannot go on at all.
    """

    def __init__(
        self, route: Route, broker: Broker, surroundings: Surroundings, fatal: Callable[[BaseException], None]
    ) -> None:
        self.route = route
        self._broker = broker
        self._around = surroundings
        self._solitude = surroundings.solitude
        self._fatal = fatal
        self._executor = Executor(route.handler, route.policy.concurrency, route.name)
        own = [Queue(name) for name in route.queues]
        lanes = [Queue(suspect_queue(name)) for name in route.queues]
        self._origin = {suspect_queue(name): name for name in route.queues}
        self._subscription = self._subscribe(own, route.prefetch)
        self._lane = self._subscribe(lanes, 1, ahead=False)
        self._settler = Settler(self._subscription, self._settled, route.announce)
        self._lane_settler = Settler(self._lane, lambda count: None, route.announce)
        self._buffer: Buffer[list[Message]] = Buffer()
        self._batching = Batching(route.bulk_size, route.policy.bulk_timeout, self._buffer.put)
        self._verdicts = Verdicts(route.policy, self._origin, surroundings, announced=route.announce is not None)
        self._ahead = LookAhead(route.prefetch, route.policy.concurrency * route.bulk_size)
        # A task tells its caller, and its record, when it comes too late.
        self._drops_expired = not broker.capabilities.expiry and route.announce is None
        self.settled = 0
        """Messages that are done with, one way or another, since it began."""
        self._in_hand = 0
        self._room = Bell()
        self._short_of_room = False
        self._turned = 0.0
        self._outages = 0
        self._paused_until = 0.0
        self._running: set[asyncio.Task[Any] | None] = set()
        self._quiet = asyncio.Event()
        self._stopping = False
        self._failed = False
        self._cut_short = False
        self._intake: list[asyncio.Task[None]] = []
        self._workers: list[asyncio.Task[None]] = []
        self._settlers: list[asyncio.Task[None]] = []

    # -- life cycle

    @property
    def consuming(self) -> bool:
        return self._subscription.consuming and not (self._stopping or self._failed)

    async def start(self) -> None:
        """Declare the queues and begin.

        :raises BrokerError: a queue cannot be declared.
        """
        for queue in queues_of(self.route):
            await self._broker.declare(queue)
        name = self.route.name
        self._settlers = [self._spawn(one.run(), f"{name} settler") for one in (self._settler, self._lane_settler)]
        self._workers = [self._spawn(self._work(), f"{name} worker {n}") for n in range(self.route.policy.concurrency)]
        self._intake = [
            self._spawn(self._receive(), f"{name} intake"),
            self._spawn(self._try_suspects(), f"{name} suspects"),
        ]

    async def stop(self, grace: float) -> None:
        """Receive no more, let what runs finish within `grace` seconds, settle it, release the rest."""
        await self.finish(grace)
        await self.close()

    async def finish(self, grace: float) -> None:
        """Receive no more, let what runs end within `grace` seconds and settle it: in what is left of them."""
        until = asyncio.get_running_loop().time() + grace
        self._stopping = True
        self._intake[0].cancel()
        self._give_back_unstarted()
        if self._running and not self._cut_short:
            try:
                async with asyncio.timeout(grace):
                    await self._quiet.wait()
            except TimeoutError:
                log.warning("%s: %d handler calls did not end within the grace", self.route.name, len(self._running))
        await _cancel([*self._intake, *self._workers])
        self._give_back_unstarted()
        for settler, task in zip((self._settler, self._lane_settler), self._settlers, strict=True):
            drained = asyncio.ensure_future(settler.drained())
            left = max(until - asyncio.get_running_loop().time(), LAST_SETTLING)
            try:
                await asyncio.wait((drained, task), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not drained.done():
                    log.error("%s: the broker did not take the last settlements; they come again", self.route.name)
                    drained.cancel()

    async def close(self) -> None:
        """Release what is left."""
        for one in (*self._intake, *self._workers):  # what had its time, and did not end
            one.cancel()
        try:
            await _cancel(self._settlers)
        finally:
            try:
                await together(self._subscription.close, self._lane.close)
            finally:
                self._executor.close()

    def cancel(self) -> None:
        """Cut the grace of a stop short: cancel what runs; its messages are released."""
        self._stopping = self._cut_short = True
        for task in tuple(self._running):
            if task is not None:
                task.cancel()

    def _subscribe(self, queues: Sequence[Queue], prefetch: int, *, ahead: bool = True) -> Subscription:
        lease = self._around.lease
        return self._broker.subscribe(queues, prefetch=prefetch, lease=lease, on_lost=self._lost, ahead=ahead)

    def _lost(self, deliveries: Sequence[Delivery]) -> None:
        log.warning("%s: %d messages in hand were lost to other consumers", self.route.name, len(deliveries))

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=name)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        error: BaseException | None = None
        if not task.cancelled():
            error = task.exception()
        elif not self._stopping:
            self._failed = True
            if not all(one.done() or one.cancelling() for one in (*self._intake, *self._workers, *self._settlers)):
                error = RuntimeError(f"{task.get_name()} was cancelled from outside")  # and only it: nobody else tells
        if error is not None:
            self._failed = True
            self._fatal(error)

    def _meant(self) -> bool:
        """Whether a cancellation is for us: a stop, or the end of an event loop that nobody stopped us in."""
        intake = self._intake[0]
        return self._stopping or intake.done() or intake.cancelling() > 0

    # -- intake

    async def _receive(self) -> None:
        """Keep the hand full, in large helpings: a new one when a quarter of it is free or nothing waits."""
        ahead, now = self._ahead, self._around.clock.monotonic
        failures = 0
        more = False
        received_at = now()
        while not self._stopping:  # a driver may have swallowed the cancellation meant for this task
            pause = self._paused_until - now()
            if pause > 0:
                await asyncio.sleep(pause)
                continue
            if self._buffer.items:
                ahead.waited(now() - received_at)
            elif more:
                ahead.ran_dry()
                more = False
            room = ahead.size - self._in_hand
            if room < ahead.enough and (self._buffer.items or room <= 0):
                self._short_of_room = True
                await self._room.wait()
                self._short_of_room = False
                continue
            try:
                deliveries = await self._subscription.receive(room, RECEIVE_WAIT)
            except BrokerRefused:
                raise
            except BrokerError as error:
                failures += 1
                delay = backoff_delay(failures, (0.1, 5.0), self._around.rng)
                log.warning("%s: cannot receive, again in %.1f s: %s", self.route.name, delay, one_line(error))
                await asyncio.sleep(delay)
            else:
                failures = 0
                more = len(deliveries) == room
                received_at = now()
                self._in_hand += len(deliveries)
                self._admit(deliveries)

    def _admit(self, deliveries: list[Delivery]) -> None:
        """Sort what came in: suspects to their lane, the undecodable to the dead letters, the rest to the handler."""
        if self._around.clock.monotonic() < self._paused_until:
            self._settler.extend([Release(delivery) for delivery in deliveries])
            return
        fresh: list[Message] = []
        singles: list[list[Message]] = []
        one_by_one = self.route.one_by_one
        for delivery in deliveries:
            past = history.read(delivery.headers) if history.HEADER in delivery.headers else history.NEW
            if delivery.redelivered:
                self._settler.add(self._verdicts.suspect(delivery, past))
                continue
            if self._drops_expired and self._has_expired(delivery):
                continue
            message = self._decode(delivery, past, delivery.queue, self._settler)
            if message is None:
                continue
            if one_by_one or past.failures:  # what has failed is tried by itself, not with new batch-mates
                singles.append([message])
            else:
                fresh.append(message)
        if singles:
            self._buffer.put(singles)
        if fresh:
            self._batching.add(fresh)

    def _has_expired(self, delivery: Delivery) -> bool:
        """Whether nobody took it in time: then it is dropped, where the system itself does not do that."""
        if delivery.expires_at is None or delivery.expires_at > self._around.clock.time():
            return False
        log.info("%s: message %s has expired", delivery.queue, delivery.id)
        self._settler.add(Ack(delivery))
        return True

    def _decode(self, delivery: Delivery, past: History, queue: str, settler: Settler) -> Message | None:
        limit = self._around.max_body
        try:
            if len(delivery.raw) > limit:
                raise InvalidMessage(
                    f"body of {len(delivery.raw)} bytes is over the ceiling of {limit} bytes (max_body)"
                )
            body = self.route.binding.decode(delivery.raw, delivery.headers, limit)
        except InvalidMessage as error:
            log.warning("%s: message %s is invalid: %s", queue, delivery.id, error)
            error.__traceback__ = None  # ours, not the user's
            settler.add(self._verdicts.bury(delivery, "invalid", past._replace(failures=past.failures + 1), error))
            return None
        return Message(delivery, body, past.failures + past.redelivered + delivery.redelivered + 1, queue)

    # -- running

    async def _work(self) -> None:
        buffer, solitude = self._buffer, self._solitude
        items = buffer.items
        task = asyncio.current_task()
        now = self._around.clock.monotonic
        while not self._stopping:  # a handler may have swallowed the cancellation meant for this task
            try:
                if items and now() - self._turned > LONGEST_TURN:
                    self._turned = now()
                    await asyncio.sleep(0)  # handlers that never wait would keep back the heartbeat too
                messages = items.popleft() if items else await buffer.get()
                if self._short_of_room and not items:
                    self._room.ring()  # nothing waits any more: a small helping will do
                if solitude.closed:
                    await self._wait_turn(messages)
            except asyncio.CancelledError:
                if self._meant():
                    raise
                await _go_on(task)  # it came from a timer that a handler left behind, say
                continue
            if [message for message in messages if message.source.lost]:
                messages = self._without_lost(messages)
                if not messages:
                    continue
            await self._run(messages, self._settler, task)

    async def _wait_turn(self, messages: list[Message]) -> None:
        try:
            await self._solitude.opened()
        except asyncio.CancelledError:
            self._settler.extend([Release(message.source) for message in messages])
            raise

    def _without_lost(self, messages: list[Message]) -> list[Message]:
        kept = [message for message in messages if not message.source.lost]
        self._settled(len(messages) - len(kept))
        return kept

    async def _run(self, messages: list[Message], settler: Settler, task: asyncio.Task[Any] | None) -> None:
        """One handler call and its outcome, in the running `task`."""
        solitude = self._solitude
        solitude.running += 1
        self._running.add(task)
        current_message.set(messages[0])
        failure: BaseException | None = None
        try:
            await self._executor.call(self.route.binding.argument(messages))
        except asyncio.CancelledError as error:
            if self._meant():
                settler.extend([self._verdicts.interrupted(message) for message in messages])
                raise
            failure = error  # the handler cancelled itself
        except GeneratorExit:
            raise
        except BaseException as error:
            failure = error
        finally:
            solitude.left()
            self._running.discard(task)
            if self._stopping and not self._running:
                self._quiet.set()
        self._conclude(messages, failure, settler)
        if task is not None and task.cancelling() and not self._meant():
            await _go_on(task)

    def _conclude(self, messages: list[Message], failure: BaseException | None, settler: Settler) -> None:
        if failure is None:
            self._outages = 0
            if self.route.policy.on_success is Actions.ACK:
                settler.extend(
                    [
                        Ack(message.source)
                        if message.decision is None
                        else self._verdicts.outcome(message, message.decision, None)
                        for message in messages
                    ]
                )
                return
            default = _DECISIONS[self.route.policy.on_success]
        elif isinstance(failure, Unavailable):
            self._pause(messages, failure, settler)
            return
        else:
            default = _DECISIONS[self.route.policy.on_exception]
            self._complain(messages, failure)
        settler.extend([self._verdicts.outcome(message, message.decision or default, failure) for message in messages])

    def _complain(self, messages: list[Message], failure: BaseException) -> None:
        first = messages[0]
        which = f"message {first.id}" if len(messages) == 1 else f"{len(messages)} messages from {first.id} on"
        log.warning(
            "%s failed on %s (attempt %d): %s",
            self.route.name, which, first.attempt, one_line(failure), exc_info=failure,
        )  # fmt: skip

    def _pause(self, messages: list[Message], failure: Unavailable, settler: Settler) -> None:
        """What the handler writes to is away: back into the queue with everything, and wait. No attempt is counted."""
        self._outages += 1
        first, longest = self.route.policy.backoff
        pause = max(backoff_delay(self._outages, (first, min(longest, LONGEST_PAUSE)), self._around.rng), 0.05)
        self._paused_until = self._around.clock.monotonic() + pause
        log.warning("%s pauses for %.1f s: %s", self.route.name, pause, one_line(failure))
        settler.extend(
            [
                self._verdicts.interrupted(message)
                if message.decision is None
                else self._verdicts.outcome(message, message.decision, failure)
                for message in messages
            ]
        )
        self._give_back_unstarted()

    def _give_back_unstarted(self) -> None:
        unstarted = [message for messages in self._buffer.clear() for message in messages] + self._batching.clear()
        self._settler.extend([Release(message.source) for message in unstarted])

    def _settled(self, count: int) -> None:
        self._in_hand -= count
        self.settled += count
        self._room.ring()

    # -- suspects

    async def _try_suspects(self) -> None:
        """Look for suspects without keeping one, and when there are some, run them one after another, alone."""
        failures = crowded = missed = 0
        while not self._stopping:
            try:
                peeked = await self._lane.receive(1, RECEIVE_WAIT)
                failures = 0
                if not peeked:
                    crowded = missed = 0
                    continue
                if await self._convicted(peeked[0]):
                    continue
                await self._settle_lane(Release(peeked[0]))
                pause = self._paused_until - self._around.clock.monotonic()
                if pause > 0:
                    await asyncio.sleep(pause)
                lease = self._around.lease
                async with self._solitude.alone(lease * min(2**crowded, MOST_PATIENCE)) as alone:
                    # What was given back may be there only after a while, and another process may have it by then.
                    found = alone and await self._run_suspects(min(SUSPECT_WAIT * 2**missed, lease))
                crowded = 0 if alone else crowded + 1
                missed = 0 if found else missed + alone
            except BrokerRefused:
                raise
            except BrokerError as error:
                failures += 1
                log.warning("%s: cannot look for suspects: %s", self.route.name, one_line(error))
            if rounds := max(failures, crowded, missed):  # others look for the same one: not all at the same time
                await asyncio.sleep(backoff_delay(rounds, (0.1, 5.0), self._around.rng))

    async def _run_suspects(self, wait: float) -> bool:
        """Whether there was one within `wait` seconds of being alone; they are run while there are more."""
        until, found = self._around.clock.monotonic() + SOLITARY_SECONDS, False
        while self._around.clock.monotonic() < until and not self._stopping:
            taken = await self._lane.receive(1, SUSPECT_WAIT if found else wait)
            if not taken:
                return found
            delivery, found = taken[0], True
            if await self._convicted(delivery):
                continue
            queue = self._origin[delivery.queue]
            message = self._decode(delivery, history.read(delivery.headers), queue, self._lane_settler)
            if message is not None:
                log.debug("%s: running suspect %s alone", self.route.name, message.id)
                await self._run([message], self._lane_settler, asyncio.current_task())
            await self._lane_settler.drained()
            if self._paused_until > self._around.clock.monotonic():
                break
        return found

    async def _convicted(self, delivery: Delivery) -> bool:
        """Whether a message from the lane killed its solitary run; if so, it is dealt with."""
        conviction = self._verdicts.conviction(delivery)
        if conviction is None:
            return False
        await self._settle_lane(conviction)
        return True

    async def _settle_lane(self, outcome: Outcome) -> None:
        self._lane_settler.add(outcome)
        await self._lane_settler.drained()


async def _go_on(task: asyncio.Task[Any] | None) -> None:
    """Forget that a handler cancelled the running `task`, which is ours."""
    while task is not None and task.cancelling():
        task.uncancel()
    with contextlib.suppress(asyncio.CancelledError):  # before Python 3.13 it is raised all the same
        await asyncio.sleep(0)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=LAST_WAIT)
