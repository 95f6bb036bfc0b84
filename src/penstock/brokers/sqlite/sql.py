"""Every statement, named.

Many rows travel as one: a JSON list of numbers goes in, one concatenated row comes out. Python's
driver gives up the GIL at each row it steps over, and getting it back from a busy event loop costs
far more than the row.

The lives of a message: *ready* (free, no `due`, not `blocked`), *delayed* (`due` set), *blocked*
(behind an older message of its key in an ordered queue), *held* (`owner` is a consumer).
"""

from __future__ import annotations

from penstock.sqlite.schema import FREE, IS_READY

_LISTED = "seq IN (SELECT value FROM json_each(?))"


# -- queues

QUEUE = "SELECT id, ordered, base, max_length FROM queues WHERE namespace = ? AND name = ?"
ADD_QUEUE = "INSERT INTO queues (namespace, name, ordered, base, max_length) VALUES (?, ?, ?, ?, ?)"
BIND = "INSERT OR IGNORE INTO bindings (namespace, topic, queue) VALUES (?, ?, ?)"
UNBIND = "DELETE FROM bindings WHERE namespace = ? AND topic = ? AND queue = ?"
LANES = "SELECT id FROM queues WHERE base IN (SELECT value FROM json_each(?))"
BOUND = """
    SELECT q.id, q.name, q.ordered, q.base, q.max_length
    FROM bindings b JOIN queues q ON q.id = b.queue WHERE b.namespace = ? AND b.topic = ?"""
LENGTH_UP_TO = "SELECT count(*) FROM (SELECT 1 FROM messages WHERE queue = ? LIMIT ?)"

# -- publishing; the values are repeated for many rows in one statement

INSERT = "INSERT INTO messages (queue, rank, due, expires, line, meta, body) VALUES "
INSERT_ROW = "(?, ?, ?, ?, ?, ?, ?)"

# -- what time brings about

NEXT_DUE = "SELECT min(due) FROM messages WHERE due IS NOT NULL"
NEXT_EXPIRY = f"SELECT min(expires) FROM messages WHERE expires IS NOT NULL AND owner = {FREE}"
DUE_QUEUES = "SELECT DISTINCT queue FROM messages WHERE due IS NOT NULL AND due <= ?"
END_DELAYS = "UPDATE messages SET due = NULL WHERE due IS NOT NULL AND due <= ?"
COUNT_EXPIRED = f"""
    UPDATE queues SET expired = expired + e.n
    FROM (SELECT queue, count(*) AS n FROM messages
          WHERE expires IS NOT NULL AND owner = {FREE} AND expires <= ? GROUP BY queue) AS e
    WHERE queues.id = e.queue"""
EXPIRE = f"DELETE FROM messages WHERE expires IS NOT NULL AND owner = {FREE} AND expires <= ?"

# -- claiming; Python takes numbered parameters (?1) for named ones, and refuses them from 3.14 on

ANY_READY = f"""
    SELECT 1 FROM messages WHERE {IS_READY} AND queue = ?
    AND NOT (SELECT paused FROM queues WHERE id = ?) LIMIT 1"""
CANDIDATES = f"""
    SELECT json_group_array(seq), json_group_array(size), total(size) FROM (
        SELECT seq, length(body) AS size FROM messages
        WHERE {IS_READY} AND queue = ? AND NOT (SELECT paused FROM queues WHERE id = ?)
        ORDER BY rank, seq LIMIT ?)"""
CLAIM = f"UPDATE messages SET owner = ? WHERE {_LISTED}"
_CONTENT = """
    SELECT '[' || group_concat('[' || m.seq || ',' || m.queue || ',' || m.redelivered || ','
               || length(m.body) || ',' || m.meta || ']') || ']',
           CAST(group_concat(m.body, '') AS BLOB)
    FROM """
CLAIMED = _CONTENT + "json_each(?) j CROSS JOIN messages m ON m.seq = j.value"
ANY_AFTER = "SELECT 1 FROM messages WHERE queue = ? AND seq > ? LIMIT 1"
BROWSE = _CONTENT + "(SELECT * FROM messages WHERE queue = ? AND seq > ? ORDER BY seq LIMIT ?) m"

# -- settling

ALIVE = "SELECT 1 FROM consumers WHERE id = ?"
ACK = f"DELETE FROM messages WHERE {_LISTED}"
RELEASE = f"UPDATE messages SET owner = {FREE}, due = ? WHERE {_LISTED}"
MOVE = f"""
    UPDATE messages SET queue = ?, rank = ?, owner = {FREE}, due = ?, expires = ?, line = ?, redelivered = 0,
                        meta = ?, body = ? WHERE seq = ?"""

# -- consumers

JOIN = "INSERT INTO consumers (port, deadline, lease) VALUES (?, ?, ?)"
CONSUME = "INSERT INTO consuming (consumer, queue) VALUES (?, ?)"
BEAT = "UPDATE consumers SET deadline = ? WHERE id = ?"
LEAVE = f"UPDATE messages SET owner = {FREE} WHERE owner = ? AND owner > 0"
FORGET = "DELETE FROM consumers WHERE id = ?"
STOP_CONSUMING = "DELETE FROM consuming WHERE consumer = ?"
# A deadline further ahead than the lease was written before the machine last started.
OVERDUE = "SELECT id FROM consumers WHERE ? NOT BETWEEN deadline - lease - 1 AND deadline"
# What was taken in time expires no more.
TAKE_OVER = f"""
    UPDATE messages SET owner = {FREE}, redelivered = redelivered + 1, expires = NULL WHERE owner = ? AND owner > 0"""
HELD_QUEUES = "SELECT DISTINCT queue FROM messages WHERE owner = ? AND owner > 0"

# -- broadcasts; who listens to them consumes the queue 0, and whoever awaits replies one of its own, which no queue is

INBOXES = 0
FIRST_ADDRESS = 1 << 61
NOBODY = FIRST_ADDRESS - 1
ANYBODY_LISTENING = "SELECT 1 FROM consuming WHERE queue = ? LIMIT 1"
ADD_BROADCAST = "INSERT INTO broadcasts (namespace, topic, at, meta, body) VALUES (?, ?, ?, ?, ?)"
OLDEST_BROADCAST = "SELECT at NOT BETWEEN ? AND ? FROM broadcasts ORDER BY seq LIMIT 1"
# Only the oldest are looked at: there may be a minute's replies to a busy caller.
DROP_BROADCASTS = """
    DELETE FROM broadcasts WHERE seq IN (
        SELECT seq FROM (SELECT seq, at FROM broadcasts ORDER BY seq LIMIT 500) WHERE at NOT BETWEEN ? AND ?)"""
DROP_HEARD = f"DELETE FROM broadcasts WHERE {_LISTED}"
LAST_BROADCAST = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'broadcasts'), 0)"
BROADCASTS = """
    SELECT seq, meta, body FROM broadcasts
    WHERE seq > ? AND namespace = ? AND topic IN (SELECT value FROM json_each(?)) ORDER BY seq LIMIT ?"""

# -- the operator's side

INSPECT = f"""
    WITH waiting (queue, count, oldest) AS (
            SELECT queue, count(*), min(seq) FROM messages WHERE {IS_READY} GROUP BY queue
            UNION ALL
            SELECT queue, count(*), min(seq) FROM messages
            WHERE due IS NOT NULL AND owner = {FREE} GROUP BY queue
            UNION ALL
            SELECT queue, count(*), min(seq) FROM messages
            WHERE line IS NOT NULL AND blocked = 1 AND due IS NULL AND owner = {FREE} GROUP BY queue),
        held (queue, count) AS (SELECT queue, count(*) FROM messages WHERE owner > 0 GROUP BY queue),
        waits (queue, count, oldest) AS (SELECT queue, sum(count), min(oldest) FROM waiting GROUP BY queue)
    SELECT q.name, q.paused, q.expired, q.discarded,
        (SELECT count(*) FROM consuming WHERE queue = q.id),
        (SELECT json_group_array(topic) FROM bindings WHERE namespace = q.namespace AND queue = q.id),
        coalesce(waits.count, 0), coalesce(held.count, 0), m.meta
    FROM queues q
    LEFT JOIN waits ON waits.queue = q.id
    LEFT JOIN held ON held.queue = q.id
    LEFT JOIN messages m ON m.seq = waits.oldest
    WHERE q.namespace = ? ORDER BY q.name"""
PURGE = f"DELETE FROM messages WHERE queue = ? AND owner = {FREE}"
COUNT_DISCARDED = "UPDATE queues SET discarded = discarded + ? WHERE id = ?"
PAUSE = "UPDATE queues SET paused = ? WHERE id = ?"
