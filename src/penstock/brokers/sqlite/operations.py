"""What happens to the file, each a plain function inside one transaction."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from penstock.brokers.base import Ack, Queue, QueueInfo, Release, Settlement
from penstock.brokers.sqlite import sql
from penstock.errors import BrokerError, PublishError, QueueFull, QueueMismatch, Unroutable
from penstock.message import Delivery, Outgoing
from penstock.sqlite.file import Transaction

MAX_CLAIM_BYTES = 64 * 2**20  # SQLite joins a claim's bodies into one value, of at most 1 GB
INSERT_SIZES = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)  # few distinct statements, so that they stay prepared


class Meta(msgspec.Struct, array_like=True):
    """What never changes while a message waits, as it is written into `messages.meta`."""

    id: str
    topic: str
    key: str | None
    priority: int
    enqueued_at: float
    expires_at: float | None
    headers: dict[str, Any]
    reply_to: str | None = None


class Bound(NamedTuple):
    """A row of `queues`, as far as storing a message needs it."""

    id: int
    name: str
    ordered: bool
    base: int | None
    max_length: int | None

    def line(self, key: str | None) -> str | None:
        return f"{self.base or self.id}:{key}" if self.ordered and key is not None else None


class Membership(NamedTuple):
    """One life of a subscription: from joining until it leaves or is given up for dead."""

    consumer: int
    queues: tuple[tuple[int, str], ...]
    related: set[int]
    """Its queues and those whose key order they share: where a settlement may set something free."""
    ordered: bool


class Claimed(NamedTuple):
    """Messages taken, or none and the seconds until a delay ends (None: no delay is running)."""

    deliveries: list[Delivery]
    upcoming: float | None


_encode_meta = msgspec.json.Encoder().encode
_decode_meta = msgspec.json.Decoder(Meta).decode
_decode_content = msgspec.json.Decoder(list[tuple[int, int, int, int, Meta]]).decode
_decode_ints = msgspec.json.Decoder(list[int]).decode


def _as_list(seqs: Sequence[int]) -> str:
    return msgspec.json.encode(seqs).decode()


def find_queue(tx: Transaction, namespace: str, name: str) -> Bound | None:
    row = tx.execute(sql.QUEUE, (namespace, name)).fetchone()
    return Bound(row[0], name, bool(row[1]), row[2], row[3]) if row else None


def declare(tx: Transaction, namespace: str, queue: Queue) -> int:
    """The id of a queue that now exists.

    :raises QueueMismatch: it exists otherwise.
    """
    found = find_queue(tx, namespace, queue.name)
    if found is None:
        base = None
        if queue.lane_of is not None:
            beside = find_queue(tx, namespace, queue.lane_of)
            base = beside.id if beside else None
        cursor = tx.execute(sql.ADD_QUEUE, (namespace, queue.name, queue.ordered, base, queue.max_length))
        queue_id = int(cursor.lastrowid or 0)
    elif found.ordered != queue.ordered:
        raise QueueMismatch(f"queue {queue.name!r} exists with ordered={found.ordered}")
    else:
        queue_id = found.id
    for topic in (queue.name, *queue.topics):
        tx.execute(sql.BIND, (namespace, topic, queue_id))
    return queue_id


def publish(tx: Transaction, namespace: str, messages: Sequence[Outgoing]) -> list[PublishError | None]:
    now = time.time()
    bound: dict[str, list[Bound]] = {}
    room: dict[int, int] = {}
    rows: list[Any] = []
    count = 0
    outcomes: list[PublishError | None] = []
    for message in messages:
        topic = message.topic
        targets = bound.get(topic)
        if targets is None:
            found = tx.execute(sql.BOUND, (namespace, topic)).fetchall()
            targets = bound[topic] = [Bound(row[0], row[1], bool(row[2]), row[3], row[4]) for row in found]
        if not targets:
            outcomes.append(Unroutable(topic))
            continue
        full = _first_full(tx, targets, room)
        if full is not None:
            outcomes.append(full)
            continue
        due = now + message.delay if message.delay > 0 else None
        meta = encode_meta(message)
        for queue in targets:
            rows += (queue.id, -message.priority, due, message.expires_at, queue.line(message.key), meta, message.body)
            tx.woken.add(queue.id)
            count += 1
        outcomes.append(None)
    _insert(tx, rows, count)
    return outcomes


def _first_full(tx: Transaction, targets: list[Bound], room: dict[int, int]) -> QueueFull | None:
    """Reserves a place in each queue that has a ceiling, or says which has none left."""
    limited = [queue for queue in targets if queue.max_length is not None]
    for queue in limited:
        limit = queue.max_length or 0
        if queue.id not in room:
            sweep(tx)  # what has expired takes no room
            room[queue.id] = limit - int(tx.execute(sql.LENGTH_UP_TO, (queue.id, limit)).fetchone()[0])
        if room[queue.id] <= 0:
            return QueueFull(queue.name, limit)
    for queue in limited:
        room[queue.id] -= 1
    return None


def _insert(tx: Transaction, rows: list[Any], count: int) -> None:
    width = 7
    at = 0
    for size in INSERT_SIZES:
        while count - at >= size:
            statement = sql.INSERT + ", ".join([sql.INSERT_ROW] * size)
            tx.execute(statement, rows[at * width : (at + size) * width])
            at += size


def encode_meta(message: Outgoing) -> str:
    said: tuple[Any, ...] = (
        message.id,
        message.topic,
        message.key,
        message.priority,
        message.enqueued_at,
        message.expires_at,
        message.headers,
    )
    if message.reply_to is not None:
        said = (*said, message.reply_to)
    return _encode_meta(said).decode()


def heard(seq: int, meta: str, body: bytes) -> Delivery:
    """A broadcast as an inbox gives it."""
    said = _decode_meta(meta)
    return Delivery(
        "",
        said.id,
        said.topic,
        body,
        said.headers,
        said.key,
        said.priority,
        said.enqueued_at,
        None,
        0,
        seq,
        reply_to=said.reply_to,
    )


def sweep(tx: Transaction) -> float | None:
    """End the delays that are over and drop what has expired; when the next delay ends."""
    now = time.time()
    due = tx.execute(sql.NEXT_DUE).fetchone()[0]
    if due is not None and due <= now:
        tx.woken.update(row[0] for row in tx.execute(sql.DUE_QUEUES, (now,)))
        tx.execute(sql.END_DELAYS, (now,))
        due = tx.execute(sql.NEXT_DUE).fetchone()[0]
    expiry = tx.execute(sql.NEXT_EXPIRY).fetchone()[0]
    if expiry is not None and expiry <= now:
        tx.execute(sql.COUNT_EXPIRED, (now,))
        tx.execute(sql.EXPIRE, (now,))
    return None if due is None else float(due)


def nothing_to_claim(tx: Transaction, queue_ids: Sequence[int]) -> Claimed | None:
    """The answer of a claim that would find nothing, without taking the write lock; else None."""
    now = time.time()
    due = tx.execute(sql.NEXT_DUE).fetchone()[0]
    if due is not None and due <= now:
        return None
    expiry = tx.execute(sql.NEXT_EXPIRY).fetchone()[0]
    if expiry is not None and expiry <= now:
        return None  # one of its key may be waiting behind it
    for queue_id in queue_ids:
        if tx.execute(sql.ANY_READY, (queue_id, queue_id)).fetchone():
            return None
    return Claimed([], None if due is None else max(due - now, 0.0))


def claim(tx: Transaction, consumer: int, queues: Sequence[tuple[int, str]], limit: int) -> Claimed | None:
    """Up to `limit` messages for a consumer; None when the consumer has been given up for dead."""
    if tx.execute(sql.ALIVE, (consumer,)).fetchone() is None:
        return None
    due = sweep(tx)
    names = dict(queues)
    deliveries: list[Delivery] = []
    budget = MAX_CLAIM_BYTES
    for queue_id, _ in queues:
        if len(deliveries) >= limit or budget <= 0:
            break
        seqs, sizes, total = tx.execute(sql.CANDIDATES, (queue_id, queue_id, limit - len(deliveries))).fetchone()
        if seqs == "[]":
            continue
        if total > budget:
            seqs = _within(seqs, sizes, budget, at_least_one=not deliveries)
        budget -= int(total)
        if seqs == "[]":
            break
        tx.execute(sql.CLAIM, (consumer, seqs))
        content, bodies = tx.execute(sql.CLAIMED, (seqs,)).fetchone()
        deliveries += _deliveries(content, bodies, names)
    if deliveries or due is None:
        return Claimed(deliveries, None)
    return Claimed(deliveries, max(due - time.time(), 0.0))


def _within(seqs: str, sizes: str, budget: int, *, at_least_one: bool) -> str:
    """As many of the first candidates as fit."""
    fitting: list[int] = []
    for seq, size in zip(_decode_ints(seqs), _decode_ints(sizes), strict=True):
        budget -= size
        if budget < 0 and not (at_least_one and not fitting):
            break
        fitting.append(seq)
    return _as_list(fitting)


def _deliveries(content: str | None, bodies: bytes, names: dict[int, str]) -> list[Delivery]:
    deliveries = []
    at = 0
    for seq, queue_id, redelivered, size, meta in _decode_content(content or "[]"):
        end = at + size
        deliveries.append(
            Delivery(
                names[queue_id],
                meta.id,
                meta.topic,
                bodies[at:end],
                meta.headers,
                meta.key,
                meta.priority,
                meta.enqueued_at,
                meta.expires_at,
                redelivered,
                seq,
                reply_to=meta.reply_to,
            )
        )
        at = end
    return deliveries


def settle(tx: Transaction, namespace: str, membership: Membership, items: Sequence[Settlement]) -> bool:
    """Carry out settlements of what a consumer holds; False, and nothing done, when it was given up for dead.

    A consumer's messages are taken from it only together with its life, so one look fences them all.
    """
    if tx.execute(sql.ALIVE, (membership.consumer,)).fetchone() is None:
        return False
    acks: list[int] = []
    releases: dict[float, list[int]] = {}
    moves = []
    for item in items:
        if isinstance(item, Ack):
            acks.append(item.delivery.token)
        elif isinstance(item, Release):
            releases.setdefault(item.delay, []).append(item.delivery.token)
        else:
            moves.append(item)
    if acks:
        tx.execute(sql.ACK, (_as_list(acks),))
    for delay, seqs in releases.items():
        tx.execute(sql.RELEASE, (time.time() + delay if delay > 0 else None, _as_list(seqs)))
    if releases or membership.ordered:
        tx.woken |= membership.related
    targets: dict[str, Bound] = {}
    for move in moves:
        target = targets.get(move.to) or find_queue(tx, namespace, move.to)
        if target is None:
            raise BrokerError(f"cannot move to {move.to!r}: it is not declared")
        targets[move.to] = target
        message = move.message
        due = time.time() + message.delay if message.delay > 0 else None
        row = (target.id, -message.priority, due, message.expires_at, target.line(message.key), encode_meta(message))
        tx.execute(sql.MOVE, (*row, message.body, move.delivery.token))
        tx.woken.add(target.id)
    return True


def join(tx: Transaction, namespace: str, names: Sequence[str], port: int, lease: float) -> Membership:
    """Become a consumer of some queues.

    :raises BrokerError: one of them is not declared.
    """
    queues = []
    for name in names:
        queue = find_queue(tx, namespace, name)
        if queue is None:
            raise BrokerError(f"cannot consume {name!r}: it is not declared")
        queues.append(queue)
    consumer = int(tx.execute(sql.JOIN, (port, time.monotonic() + lease, lease)).lastrowid or 0)
    tx.executemany(sql.CONSUME, [(consumer, queue.id) for queue in queues])
    related = {queue.id for queue in queues} | {queue.base for queue in queues if queue.base is not None}
    related.update(row[0] for row in tx.execute(sql.LANES, (_as_list(list(related)),)))
    return Membership(
        consumer, tuple((queue.id, queue.name) for queue in queues), related, any(queue.ordered for queue in queues)
    )


def beat(tx: Transaction, consumer: int, lease: float) -> bool:
    """Whether the consumer still counts as alive."""
    return tx.execute(sql.BEAT, (time.monotonic() + lease, consumer)).rowcount == 1


def leave(tx: Transaction, consumer: int) -> None:
    tx.woken.update(row[0] for row in tx.execute(sql.HELD_QUEUES, (consumer,)))
    tx.execute(sql.LEAVE, (consumer,))
    _forget(tx, consumer)


def nobody_overdue(tx: Transaction) -> bool | None:
    """True when every consumer is within its lease, else None."""
    return None if tx.execute(sql.OVERDUE, (time.monotonic(),)).fetchone() else True


def take_over(tx: Transaction) -> bool:
    """Free the messages of consumers that have been silent for their lease."""
    for (consumer,) in tx.execute(sql.OVERDUE, (time.monotonic(),)).fetchall():
        tx.woken.update(row[0] for row in tx.execute(sql.HELD_QUEUES, (consumer,)))
        tx.execute(sql.TAKE_OVER, (consumer,))
        _forget(tx, consumer)
    return True


def _forget(tx: Transaction, consumer: int) -> None:
    tx.execute(sql.FORGET, (consumer,))
    tx.execute(sql.STOP_CONSUMING, (consumer,))


def inspect(tx: Transaction, namespace: str) -> list[QueueInfo]:
    sweep(tx)
    return [
        QueueInfo(
            name=name,
            ready=waiting,
            unsettled=held,
            consumers=consumers,
            oldest=_decode_meta(oldest).enqueued_at if oldest else None,
            paused=bool(paused),
            expired=expired,
            discarded=discarded,
            bindings=tuple(msgspec.json.decode(topics, type=list[str])),
        )
        for name, paused, expired, discarded, consumers, topics, waiting, held, oldest in tx.execute(
            sql.INSPECT, (namespace,)
        )
    ]


def browse(tx: Transaction, queue_id: int, name: str, limit: int, after: int) -> tuple[list[Delivery], int | None]:
    content, bodies = tx.execute(sql.BROWSE, (queue_id, after, limit)).fetchone()
    page = _deliveries(content, bodies or b"", {queue_id: name})
    more = page and tx.execute(sql.ANY_AFTER, (queue_id, page[-1].token)).fetchone()
    return page, page[-1].token if more else None


def purge(tx: Transaction, queue_id: int) -> int:
    count = tx.execute(sql.PURGE, (queue_id,)).rowcount
    tx.execute(sql.COUNT_DISCARDED, (count, queue_id))
    return count


def unbind(tx: Transaction, namespace: str, queue_id: int, topics: Sequence[str]) -> None:
    tx.executemany(sql.UNBIND, [(namespace, topic, queue_id) for topic in topics])


def pause(tx: Transaction, queue_id: int, paused: bool) -> None:
    tx.execute(sql.PAUSE, (paused, queue_id))
    tx.woken.add(queue_id)
