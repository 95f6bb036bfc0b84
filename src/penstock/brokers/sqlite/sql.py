"""Every statement, named.

Many rows travel as one: a JSON list of numbers goes in, one concatenated row comes out. Python's
driver gives up the GIL at each row it steps over, and getting it back from a busy event loop costs
far more than the row.

The lives of a message: *ready* (free, no `due`, not `blocked`), *delayed* (`due` set), *blocked*
(behind an older message of its key in an ordered queue), *held* (`owner` is a consumer).
"""

from __future__ import annotations

VERSION = 1
APPLICATION_ID = 0x504E5354  # "PNST"

# A free message's owner and a consumer's id take the same number of bytes in a row, so that claiming
# rewrites one page in place, however large the body behind it (1 MiB: 0.5 ms, else 5 ms).
FREE = -(1 << 40)
FIRST_CONSUMER = 1 << 40

_IS_READY = f"owner = {FREE} AND due IS NULL AND blocked = 0"
_LISTED = "seq IN (SELECT value FROM json_each(?))"

SCHEMA = f"""
CREATE TABLE queues (
    id INTEGER PRIMARY KEY,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    ordered INTEGER NOT NULL,
    base INTEGER,                           -- of a lane: the queue whose key order it shares
    max_length INTEGER,
    paused INTEGER NOT NULL DEFAULT 0,
    expired INTEGER NOT NULL DEFAULT 0,     -- messages dropped by expiry so far
    discarded INTEGER NOT NULL DEFAULT 0,   -- messages purged so far
    UNIQUE (namespace, name)
);
CREATE TABLE bindings (
    namespace TEXT NOT NULL,
    topic TEXT NOT NULL,
    queue INTEGER NOT NULL REFERENCES queues,
    PRIMARY KEY (namespace, topic, queue)
) WITHOUT ROWID;
CREATE TABLE messages (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused: a late settlement must not hit a newcomer
    queue INTEGER NOT NULL,
    rank INTEGER NOT NULL,                  -- minus the priority
    owner INTEGER NOT NULL DEFAULT {FREE},  -- the consumer that holds it
    due REAL,                               -- Unix time until which it is delayed
    expires REAL,                           -- Unix time
    line TEXT,                              -- in an ordered queue: what must be handed out one by one
    blocked INTEGER NOT NULL DEFAULT 0,
    redelivered INTEGER NOT NULL DEFAULT 0,
    meta TEXT NOT NULL,                     -- JSON: what never changes while it waits
    body BLOB NOT NULL
);
CREATE INDEX ready ON messages (queue, rank, seq) WHERE {_IS_READY};
CREATE INDEX held ON messages (owner) WHERE owner > 0;
CREATE INDEX delayed ON messages (due) WHERE due IS NOT NULL;
CREATE INDEX expiring ON messages (expires) WHERE expires IS NOT NULL AND owner = {FREE};
CREATE INDEX lines ON messages (line, seq) WHERE line IS NOT NULL;

-- Of the messages in a line exactly one is not blocked: the oldest, or one that was in hand when an
-- older one came back. When that one leaves, it is the turn of the oldest.
CREATE TRIGGER queued_in_line AFTER INSERT ON messages WHEN NEW.line IS NOT NULL BEGIN
    UPDATE messages SET blocked = 1 WHERE seq = NEW.seq
        AND EXISTS (SELECT 1 FROM messages WHERE line = NEW.line AND seq < NEW.seq);
END;
CREATE TRIGGER left_its_line AFTER DELETE ON messages WHEN OLD.line IS NOT NULL AND NOT OLD.blocked BEGIN
    UPDATE messages SET blocked = 0 WHERE seq = (SELECT min(seq) FROM messages WHERE line = OLD.line);
END;
CREATE TRIGGER changed_its_line AFTER UPDATE OF line ON messages WHEN NEW.line IS NOT OLD.line BEGIN
    UPDATE messages SET blocked = NEW.line IS NOT NULL
            AND EXISTS (SELECT 1 FROM messages WHERE line = NEW.line AND seq <> NEW.seq)
        WHERE seq = NEW.seq;
    UPDATE messages SET blocked = 0 WHERE seq = (SELECT min(seq) FROM messages WHERE line = OLD.line)
        AND NOT OLD.blocked;
END;

CREATE TABLE consumers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,   -- one life of one subscription; a new one after each loss
    port INTEGER NOT NULL,                  -- loopback UDP port of its process, for wake-ups
    deadline REAL NOT NULL,                 -- CLOCK_MONOTONIC of the machine
    lease REAL NOT NULL
);
CREATE TABLE consuming (
    consumer INTEGER NOT NULL,
    queue INTEGER NOT NULL,
    PRIMARY KEY (queue, consumer)
) WITHOUT ROWID;
CREATE TABLE broadcasts (                   -- kept only until every live inbox has surely looked
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace TEXT NOT NULL,
    topic TEXT NOT NULL,
    at REAL NOT NULL,                       -- Unix time
    meta TEXT NOT NULL,
    body BLOB NOT NULL
);
INSERT INTO sqlite_sequence (name, seq) VALUES ('consumers', {FIRST_CONSUMER});
"""

# -- queues

QUEUE = "SELECT id, ordered, base, max_length FROM queues WHERE namespace = ? AND name = ?"
ADD_QUEUE = "INSERT INTO queues (namespace, name, ordered, base, max_length) VALUES (?, ?, ?, ?, ?)"
BIND = "INSERT OR IGNORE INTO bindings (namespace, topic, queue) VALUES (?, ?, ?)"
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
    SELECT 1 FROM messages WHERE {_IS_READY} AND queue = ?
    AND NOT (SELECT paused FROM queues WHERE id = ?) LIMIT 1"""
CANDIDATES = f"""
    SELECT json_group_array(seq), json_group_array(size), total(size) FROM (
        SELECT seq, length(body) AS size FROM messages
        WHERE {_IS_READY} AND queue = ? AND NOT (SELECT paused FROM queues WHERE id = ?)
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
PORTS = """
    SELECT DISTINCT port FROM consumers JOIN consuming ON consumer = id
    WHERE queue IN (SELECT value FROM json_each(?)) AND port <> ?"""

# -- broadcasts; who listens consumes the queue 0, which no queue is

INBOXES = 0
ANYBODY_LISTENING = f"SELECT 1 FROM consuming WHERE queue = {INBOXES} LIMIT 1"
ADD_BROADCAST = "INSERT INTO broadcasts (namespace, topic, at, meta, body) VALUES (?, ?, ?, ?, ?)"
DROP_BROADCASTS = "DELETE FROM broadcasts WHERE at < ?"
LAST_BROADCAST = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'broadcasts'), 0)"
BROADCASTS = """
    SELECT seq, meta, body FROM broadcasts
    WHERE seq > ? AND namespace = ? AND topic IN (SELECT value FROM json_each(?)) ORDER BY seq LIMIT ?"""

# -- the operator's side

INSPECT = f"""
    WITH waiting (queue, count, oldest) AS (
            SELECT queue, count(*), min(seq) FROM messages WHERE {_IS_READY} GROUP BY queue
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
