"""What becomes of a message, decided without doing anything: the only place that counts attempts and crashes."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from penstock.brokers.base import Ack, Move, Release, Settlement
from penstock.clock import backoff_delay
from penstock.delivery import dead_letters, history
from penstock.delivery.dead_letters import Reason, dead_queue
from penstock.delivery.history import History
from penstock.delivery.route import MAX_CRASHES, Policy
from penstock.delivery.settlement import Burial, Forward, Outcome
from penstock.delivery.surroundings import Surroundings
from penstock.delivery.suspects import suspect_queue
from penstock.message import Decision, Delivery, Message

log = logging.getLogger("penstock.delivery")


class Verdicts:
    """The decisions of one route. `origin` gives the queue that a lane of suspects belongs to; `announced`:
    somebody is told before a message is buried."""

    def __init__(
        self, policy: Policy, origin: Mapping[str, str], around: Surroundings, *, announced: bool = False
    ) -> None:
        self._policy = policy
        self._announced = announced
        self._origin = origin
        self._around = around

    def outcome(self, message: Message, decision: Decision, failure: BaseException | None) -> Outcome:
        """Of a handler call that ended, with `failure` if it failed."""
        delivery = message.source
        if decision is Decision.ACCEPT:
            return Ack(delivery)
        past = history.read(delivery.headers)
        past = History(past.failures + 1, past.redelivered + delivery.redelivered)
        if decision is Decision.REJECT:
            reason: Reason = "failed" if failure is not None and message.decision is None else "rejected"
            return self.bury(delivery, reason, past, failure)
        limit = self._policy.max_attempts
        if limit is not None and past.failures >= limit:
            return self.bury(delivery, "failed", past, failure or f"given back {past.failures} times")
        delay = message.delay
        if delay is None:
            delay = backoff_delay(past.failures, self._policy.backoff, self._around.rng)
        return Move(delivery, message.queue, history.again(delivery, past, delay=delay))

    def interrupted(self, message: Message) -> Settlement:
        """Of a message whose handler was begun and has not come to an end. It counts as taken: it expires no more."""
        delivery = message.source
        if (
            delivery.expires_at is None or not message.taken or self._policy.ordered
        ):  # to be put again would cost it its place
            return Release(delivery)
        past = history.read(delivery.headers)
        past = past._replace(redelivered=past.redelivered + delivery.redelivered)
        return Move(delivery, delivery.queue, history.again(delivery, past))

    def bury(self, delivery: Delivery, reason: Reason, past: History, error: BaseException | str | None) -> Outcome:
        """To the dead letters, of the queue's own broker or of another one."""
        queue = self._origin.get(delivery.queue, delivery.queue)
        abroad = self._around.dead_letters
        now = self._around.clock.time()
        letter = dead_letters.bury(delivery, queue, reason, past, error, now, abroad=abroad is not None)
        where = Move(delivery, dead_queue(queue), letter) if abroad is None else Forward(delivery, abroad, letter)
        if self._announced:
            return Burial(delivery, reason, error, where)
        log.warning("%s: message %s goes to the dead letters: %s", queue, delivery.id, reason)
        return where

    def suspect(self, delivery: Delivery, past: History) -> Outcome:
        """Of a message whose consumer went away: to the lane of suspects."""
        past = past._replace(redelivered=past.redelivered + delivery.redelivered)
        return Move(delivery, suspect_queue(delivery.queue), history.again(delivery, past))

    def conviction(self, delivery: Delivery) -> Outcome | None:
        """Of a message from the lane whose solitary run killed its consumer: None if it did not."""
        if not delivery.redelivered:
            return None
        past = history.read(delivery.headers)
        past = past._replace(redelivered=past.redelivered + delivery.redelivered, crashes=past.crashes + 1)
        if past.crashes >= MAX_CRASHES:
            error = f"its consumer was lost {past.crashes} times while running it alone"
            return self.bury(delivery, "crashed", past, error)
        return Move(delivery, delivery.queue, history.again(delivery, past))
