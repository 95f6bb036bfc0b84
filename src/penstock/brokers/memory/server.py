"""The state of a memory system: what a server would hold, and what only time brings about."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.brokers.base import Ack, Move, Queue, QueueInfo, Release, Settlement
from penstock.clock import SYSTEM_CLOCK, Clock
from penstock.errors import BrokerError, PublishError, QueueFull, QueueMismatch, Unroutable
from penstock.message import Delivery, Outgoing

if TYPE_CHECKING:
    from penstock.brokers.memory.broker import MemoryInbox, MemorySubscription

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Outgoing).decode

Address = tuple[str, str]
"""Namespace and name of a queue or topic."""


class Record:
    """One stored message. It is ready, delayed, blocked behind its key, or held by `owner`."""

    __slots__ = ("address", "blocked", "data", "due", "expires_at", "line", "owner", "rank", "redelivered", "seq")

    def __init__(self, seq: int, address: Address, message: Outgoing, line: Any, due: float | None) -> None:
        self.seq = seq
        self.address = address
        self.data = encode(message)
        self.rank = -message.priority
        self.expires_at = message.expires_at
        self.line = line
        self.due = due
        self.blocked = False
        self.owner: MemorySubscription | None = None
        self.redelivered = 0

    @property
    def ready(self) -> bool:
        return self.owner is None and self.due is None and not self.blocked


class Line:
    """A queue's own state."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.ready: list[tuple[int, int]] = []  # heap of (rank, seq); stale entries are skipped
        self.count = 0
        self.paused = False
        self.expired = 0
        self.discarded = 0


def as_delivery(message: Outgoing, queue: str, redelivered: int, token: Any) -> Delivery:
    return Delivery(
        queue=queue,
        id=message.id,
        topic=message.topic,
        raw=message.body,
        headers=message.headers,
        key=message.key,
        priority=message.priority,
        enqueued_at=message.enqueued_at,
        expires_at=message.expires_at,
        redelivered=redelivered,
        token=token,
        reply_to=message.reply_to,
    )


class MemoryServer:
    """The state that brokers of one name share. Thread-safe: an app and its blocking twin may meet here."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self.lines: dict[Address, Line] = {}
        self.bindings: dict[Address, dict[Address, None]] = {}
        self.records: dict[int, Record] = {}
        self.keys: dict[Any, list[int]] = {}  # line of a key → seqs, in order
        self.consumers: dict[MemorySubscription, float] = {}  # → deadline
        self.inboxes: dict[MemoryInbox, None] = {}
        self._seqs = itertools.count(1)
        self._delayed: list[tuple[float, int]] = []
        self._expiring: list[tuple[float, int]] = []

    def declare(self, namespace: str, queue: Queue) -> None:
        with self.lock:
            address = (namespace, queue.name)
            line = self.lines.get(address)
            if line is None:
                self.lines[address] = Line(queue)
            elif line.queue.ordered != queue.ordered:
                raise QueueMismatch(f"queue {queue.name!r} exists with ordered={line.queue.ordered}")
            for topic in (queue.name, *queue.topics):
                self.bindings.setdefault((namespace, topic), {})[address] = None

    def publish(self, namespace: str, messages: Sequence[Outgoing]) -> list[PublishError | None]:
        with self.lock:
            self.sweep()  # what has expired takes no room
            return [self._publish(namespace, message) for message in messages]

    def broadcast(self, namespace: str, messages: Sequence[Outgoing]) -> None:
        with self.lock:
            for message in messages:
                data = encode(message)
                for inbox in self.inboxes:
                    if (namespace, message.topic) in inbox.addresses:
                        inbox.put(data)

    def _publish(self, namespace: str, message: Outgoing) -> PublishError | None:
        targets = self.bindings.get((namespace, message.topic))
        if not targets:
            return Unroutable(message.topic)
        for address in targets:
            line = self.lines[address]
            limit = line.queue.max_length
            if limit is not None and line.count >= limit:
                return QueueFull(address[1], limit)
        for address in targets:
            self._insert(address, message)
        return None

    def _key_line(self, address: Address, message: Outgoing) -> Any:
        queue = self.lines[address].queue
        if not queue.ordered or message.key is None:
            return None
        return (address[0], queue.lane_of or queue.name, message.key)

    def _insert(self, address: Address, message: Outgoing, seq: int | None = None) -> None:
        line = self.lines[address]
        due = self.clock.time() + message.delay if message.delay > 0 else None
        key_line = self._key_line(address, message)
        record = Record(seq or next(self._seqs), address, message, key_line, due)
        self.records[record.seq] = record
        line.count += 1
        if key_line is not None:
            seqs = self.keys.setdefault(key_line, [])
            record.blocked = any(not self.records[other].blocked for other in seqs)
            heapq.heappush(seqs, record.seq)
        if record.expires_at is not None:
            heapq.heappush(self._expiring, (record.expires_at, record.seq))
        self._offer(record)

    def _offer(self, record: Record) -> None:
        """Put a record where it will be found: among the delayed, or among the ready."""
        if record.due is not None:
            heapq.heappush(self._delayed, (record.due, record.seq))
            self._ring(record.address)  # somebody must set a timer for it
        elif record.ready:
            heapq.heappush(self.lines[record.address].ready, (record.rank, record.seq))
            self._ring(record.address)

    def _remove(self, record: Record) -> None:
        del self.records[record.seq]
        self.lines[record.address].count -= 1
        if record.line is not None:
            seqs = self.keys[record.line]
            seqs.remove(record.seq)
            heapq.heapify(seqs)
            if not seqs:
                del self.keys[record.line]
            elif not record.blocked:  # it was its turn: now it is the next one's
                head = self.records[seqs[0]]
                head.blocked = False
                self._offer(head)

    def _ring(self, address: Address) -> None:
        for consumer in self.consumers:
            if address in consumer.addresses:
                consumer.ring()

    def sweep(self) -> None:
        """What time alone brings about: delays end, untaken messages expire, silent consumers are dead."""
        now = self.clock.time()
        while self._delayed and self._delayed[0][0] <= now:
            due, seq = heapq.heappop(self._delayed)
            record = self.records.get(seq)
            if record is not None and record.due == due:
                record.due = None
                self._offer(record)
        while self._expiring and self._expiring[0][0] <= now:
            at, seq = heapq.heappop(self._expiring)
            record = self.records.get(seq)
            if record is not None and record.expires_at == at and record.owner is None:
                self.lines[record.address].expired += 1
                self._remove(record)
        alive_after = self.clock.monotonic()
        for consumer in [one for one, deadline in self.consumers.items() if deadline < alive_after]:
            self.forget(consumer, counted=True)

    def next_event(self) -> float | None:
        """Seconds until `sweep` may have something to do."""
        times = [heap[0][0] - self.clock.time() for heap in (self._delayed, self._expiring) if heap]
        if self.consumers:
            times.append(min(self.consumers.values()) - self.clock.monotonic() + 0.001)
        return max(min(times), 0.0) if times else None

    def claim(self, consumer: MemorySubscription, limit: int) -> list[Delivery]:
        with self.lock:
            self.sweep()
            taken: list[Delivery] = []
            for address in consumer.next_addresses():
                line = self.lines[address]
                while line.ready and len(taken) < limit and not line.paused:
                    _, seq = heapq.heappop(line.ready)
                    record = self.records.get(seq)
                    if record is None or not record.ready or record.address != address:
                        continue
                    record.owner = consumer
                    taken.append(self._delivery(record))
            return taken

    @staticmethod
    def _delivery(record: Record) -> Delivery:
        return as_delivery(decode(record.data), record.address[1], record.redelivered, record.seq)

    def settle(self, consumer: MemorySubscription, items: Sequence[Settlement]) -> list[Delivery]:
        with self.lock:
            self.sweep()
            namespace = consumer.addresses[0][0]
            for item in items:
                if isinstance(item, Move) and (namespace, item.to) not in self.lines:
                    raise BrokerError(f"cannot move to {item.to!r}: it is not declared")
            lost = []
            for item in items:
                record = self.records.get(item.delivery.token)
                if record is None or record.owner is not consumer:
                    lost.append(item.delivery)
                elif isinstance(item, Ack):
                    self._remove(record)
                elif isinstance(item, Release):
                    self._give_back(record, item.delay)
                else:
                    self._move(record, item)
            return lost

    def _give_back(self, record: Record, delay: float = 0.0) -> None:
        record.owner = None
        record.due = self.clock.time() + delay if delay > 0 else None
        if record.expires_at is not None:
            heapq.heappush(self._expiring, (record.expires_at, record.seq))
        self._offer(record)

    def _move(self, record: Record, item: Move) -> None:
        target = (record.address[0], item.to)
        if record.line is not None and record.line == self._key_line(target, item.message):
            # Its place in the line is taken again below: nothing behind it may be offered meanwhile.
            self.keys[record.line].remove(record.seq)
            heapq.heapify(self.keys[record.line])
            record.line = None
        self._remove(record)
        self._insert(target, item.message, seq=record.seq)

    def forget(self, consumer: MemorySubscription, *, counted: bool) -> list[Record]:
        """Take everything back from a consumer that has gone."""
        with self.lock:
            if self.consumers.pop(consumer, None) is None:
                return []
            held = [record for record in self.records.values() if record.owner is consumer]
            for record in held:
                if counted:
                    record.redelivered += 1
                    record.expires_at = None  # it was taken in time
                self._give_back(record)
            return held

    def inspect(self, namespace: str) -> list[QueueInfo]:
        with self.lock:
            self.sweep()
            found = []
            for address, line in sorted(self.lines.items()):
                if address[0] != namespace:
                    continue
                mine = [record for record in self.records.values() if record.address == address]
                waiting = [record for record in mine if record.owner is None]
                oldest = min((decode(record.data).enqueued_at for record in waiting), default=None)
                found.append(
                    QueueInfo(
                        name=address[1],
                        ready=len(waiting),
                        unsettled=len(mine) - len(waiting),
                        consumers=sum(address in consumer.addresses for consumer in self.consumers),
                        oldest=oldest,
                        paused=line.paused,
                        expired=line.expired,
                        discarded=line.discarded,
                        bindings=tuple(topic for (_, topic), bound in self.bindings.items() if address in bound),
                    )
                )
            return found

    def browse(self, address: Address, limit: int, after: int) -> tuple[list[Delivery], int | None]:
        with self.lock:
            mine = sorted(seq for seq, record in self.records.items() if record.address == address and seq > after)
            page = mine[:limit]
            return [self._delivery(self.records[seq]) for seq in page], page[-1] if len(mine) > limit else None

    def purge(self, address: Address) -> int:
        with self.lock:
            gone = [one for one in self.records.values() if one.address == address and one.owner is None]
            for record in gone:
                self._remove(record)
            self.lines[address].discarded += len(gone)
            return len(gone)

    def unbind(self, address: Address, topics: Sequence[str]) -> None:
        with self.lock:
            for topic in topics:
                self.bindings.get((address[0], topic), {}).pop(address, None)

    def pause(self, address: Address, paused: bool) -> None:
        with self.lock:
            self.lines[address].paused = paused
            self._ring(address)
