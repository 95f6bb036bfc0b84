"""Every statement, named, for one schema. What they do is said in `penstock.postgres.functions`."""

from __future__ import annotations

from penstock.postgres.address import quoted
from penstock.postgres.tables import IS_NOT_READY, IS_READY

_INSPECT = f"""
    WITH waiting (queue, count, oldest) AS (
            SELECT queue, count(*), min(seq) FROM messages WHERE {IS_READY} GROUP BY queue
            UNION ALL
            SELECT queue, count(*), min(seq) FROM messages WHERE {IS_NOT_READY} AND owner IS NULL GROUP BY queue),
        held (queue, count) AS (
            SELECT queue, count(*) FROM messages WHERE {IS_NOT_READY} AND owner IS NOT NULL GROUP BY queue),
        waits (queue, count, oldest) AS (SELECT queue, sum(count)::bigint, min(oldest) FROM waiting GROUP BY queue)
    SELECT q.name, q.paused, q.expired, q.discarded,
        (SELECT count(*) FROM consumers c WHERE q.id = ANY (c.queues)) AS consumers,
        ARRAY(SELECT b.topic FROM bindings b WHERE b.queue = q.id) AS topics,
        coalesce(waits.count, 0) AS waiting, coalesce(held.count, 0) AS held, m.meta AS oldest
    FROM queues q
    LEFT JOIN waits ON waits.queue = q.id
    LEFT JOIN held ON held.queue = q.id
    LEFT JOIN messages m ON m.seq = waits.oldest
    WHERE $1::text[] IS NULL OR q.name = ANY ($1) ORDER BY q.name"""

_BROWSE = f"""
    SELECT seq, place, queue, redelivered, meta, body FROM (
        (SELECT * FROM messages WHERE queue = $1 AND place > $2 AND {IS_READY} ORDER BY place LIMIT $3)
        UNION ALL
        (SELECT * FROM messages WHERE queue = $1 AND place > $2 AND {IS_NOT_READY} ORDER BY place LIMIT $3)) m
    ORDER BY place LIMIT $3"""

PUBLISH_TYPES = ("text[]", "int[]", "smallint[]", "float8[]", "float8[]", "text[]", "text[]", "bytea[]", "boolean")
"""Of the parameters of `publish`, for drivers that must be told."""


class Statements:
    """Of one schema."""

    def __init__(self, schema: str) -> None:
        own = quoted(schema)
        self.publish_function = f"{own}.publish"
        self.declare = f"SELECT * FROM {own}.declare($1, $2, $3, $4, $5)"
        self.publish = f"SELECT * FROM {own}.publish($1, $2, $3, $4, $5, $6, $7, $8, $9)"
        self.tell = f"SELECT set_config('synchronous_commit', 'off', true), {own}.tell($1, $2)"
        self.join = f"SELECT * FROM {own}.join_queues($1, $2)"
        self.claim = f"SELECT * FROM {own}.claim($1, $2, $3, $4, $5, $6)"
        self.reclaim = f"SELECT {own}.reclaim($1, $2, $3)"
        self.settle = f"SELECT * FROM {own}.settle($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"
        self.leave = f"SELECT {own}.leave($1)"
        self.beat = f"SELECT * FROM {own}.beat($1, $2)"
        self.listen = f"SELECT {own}.listen($1, $2, $3)"
        self.close_inbox = f"SELECT {own}.close_inbox($1)"
        self.broadcast = f"SELECT {own}.broadcast($1, $2, $3)"
        self.reply = f"SELECT {own}.reply($1, $2, $3)"
        self.fetch_mail = f"SELECT * FROM {own}.fetch_mail($1)"
        self.known = f"SELECT name FROM {own}.queues WHERE name = ANY ($1)"
        self.find_queue = f"SELECT id FROM {own}.queues WHERE name = $1"
        self.purge = f"SELECT {own}.purge($1)"
        self.pause = f"SELECT {own}.pause($1, $2)"
        self.unbind = f"DELETE FROM {own}.bindings WHERE queue = $1 AND topic = ANY ($2)"
        self.sweep_all = f"SELECT {own}.sweep(id) FROM {own}.queues"
        self.inspect, self.browse = (_within(own, text) for text in (_INSPECT, _BROWSE))


def _within(own: str, text: str) -> str:
    for table in ("messages", "consumers", "bindings", "queues"):
        text = text.replace(f"FROM {table}", f"FROM {own}.{table}").replace(f"JOIN {table}", f"JOIN {own}.{table}")
    return text
