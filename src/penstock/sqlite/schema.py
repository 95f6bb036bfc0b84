"""The tables of a file."""

from __future__ import annotations

VERSION = 2
APPLICATION_ID = 0x504E5354  # "PNST"

# A free message's owner and a consumer's id take the same number of bytes in a row, so that claiming
# rewrites one page in place, however large the body behind it (1 MiB: 0.5 ms, else 5 ms).
FREE = -(1 << 40)
FIRST_CONSUMER = 1 << 40

IS_READY = f"owner = {FREE} AND due IS NULL AND blocked = 0"

NEVER = 1 << 62
"""When an entry expires that does not."""

WATCHES = -1
"""Who follows entries consumes this queue, which no queue is."""

# Keys with an index of their own beat WITHOUT ROWID: as fast for small values, and what looks for a
# key or a version needs not step over the values (200 kB each: 4 µs instead of 108 µs a key).
# An expiry always takes eight bytes, so that a new one is written over the old one in place.
ENTRIES = f"""
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,               -- the namespace in front, see stores/sqlite
    version INTEGER NOT NULL,
    expires INTEGER NOT NULL,               -- Unix time in microseconds
    value BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS entries_expiring ON entries (expires) WHERE expires < {NEVER};
CREATE TABLE IF NOT EXISTS versions (last INTEGER NOT NULL);
INSERT INTO versions (last) SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM versions);
"""

MIGRATIONS = {1: ENTRIES}
"""What leads from a version to the next. It only adds: a process that opened the file before works on with it.
Done twice it changes nothing."""

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
CREATE INDEX ready ON messages (queue, rank, seq) WHERE {IS_READY};
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
{ENTRIES}
"""

PORTS = """
    SELECT DISTINCT port FROM consumers JOIN consuming ON consumer = id
    WHERE queue IN (SELECT value FROM json_each(?)) AND port <> ?"""
