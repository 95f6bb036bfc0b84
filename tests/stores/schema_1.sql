PRAGMA application_id = 1347310420;
PRAGMA user_version = 1;
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
    owner INTEGER NOT NULL DEFAULT -1099511627776,  -- the consumer that holds it
    due REAL,                               -- Unix time until which it is delayed
    expires REAL,                           -- Unix time
    line TEXT,                              -- in an ordered queue: what must be handed out one by one
    blocked INTEGER NOT NULL DEFAULT 0,
    redelivered INTEGER NOT NULL DEFAULT 0,
    meta TEXT NOT NULL,                     -- JSON: what never changes while it waits
    body BLOB NOT NULL
);
CREATE INDEX ready ON messages (queue, rank, seq) WHERE owner = -1099511627776 AND due IS NULL AND blocked = 0;
CREATE INDEX held ON messages (owner) WHERE owner > 0;
CREATE INDEX delayed ON messages (due) WHERE due IS NOT NULL;
CREATE INDEX expiring ON messages (expires) WHERE expires IS NOT NULL AND owner = -1099511627776;
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
INSERT INTO sqlite_sequence (name, seq) VALUES ('consumers', 1099511627776);
