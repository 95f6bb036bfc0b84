"""What happens to messages, as functions in the database: each is one round trip, and one transaction.

Every function sees its own schema first and leaves the caller's settings as they are. Those that look for
messages may only go by index: a plan made from what the statistics of a queue said yesterday is the wrong one.

What must be done to a line one after another (`stripes`) is locked by one of 64 locks of its queue, taken in
order, or not waited for at all. What is set free in a place that consumers may have passed is told as *back*.
"""

from __future__ import annotations

OWN = "LANGUAGE plpgsql SET search_path FROM CURRENT"
INDEXED = f"{OWN} SET enable_seqscan TO off SET enable_bitmapscan TO off SET enable_hashjoin TO off"
INDEXED += " SET enable_mergejoin TO off SET jit TO off"

COMMON = f"""
CREATE FUNCTION unix_now() RETURNS double precision LANGUAGE sql VOLATILE AS
    $$SELECT extract(epoch FROM clock_timestamp())::double precision$$;

CREATE FUNCTION tell(fresh int[], back int[]) RETURNS void {OWN} AS $$
BEGIN
    PERFORM pg_notify('penstock:' || current_schema(), CASE WHEN cardinality(fresh) + cardinality(back) > 600 THEN '*'
        ELSE array_to_string(fresh, ',') || ';' || array_to_string(back, ',') END);
END $$;

CREATE FUNCTION stripe_of(line text) RETURNS bigint LANGUAGE sql STABLE AS
    $$SELECT hashtextextended(current_schema() || ':' || split_part(line, ':', 1), 0) + (hashtext(line) & 63)$$;

CREATE FUNCTION lock_stripes(wanted text[]) RETURNS void {OWN} AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(s.stripe) FROM (
        SELECT DISTINCT stripe_of(w.line) AS stripe FROM unnest(wanted) w (line) ORDER BY stripe) s;
END $$;

-- Those of the lines whose stripe is to be had at once; it is locked then.
CREATE FUNCTION try_stripes(wanted text[]) RETURNS text[] {OWN} AS $$
DECLARE
    one record;
    locked text[] := '{{}}';
BEGIN
    FOR one IN SELECT stripe_of(w.line) AS stripe, array_agg(w.line) AS lines FROM unnest(wanted) w (line)
            GROUP BY 1 LOOP
        IF pg_try_advisory_xact_lock(one.stripe) THEN
            locked := locked || one.lines;
        END IF;
    END LOOP;
    RETURN locked;
END $$;

-- Each of these lines with nothing to hand out goes on with its oldest message; the queues where that is.
CREATE FUNCTION go_on(freed text[]) RETURNS int[] {INDEXED} AS $$
DECLARE
    woken int[];
BEGIN
    WITH next AS (
        SELECT (SELECT m.seq FROM messages m WHERE m.line = l.line ORDER BY m.seq LIMIT 1) AS seq
        FROM (SELECT DISTINCT unnest(freed) AS line) l
        WHERE NOT EXISTS (SELECT 1 FROM messages m WHERE m.line = l.line AND NOT m.blocked)),
    freed AS (UPDATE messages m SET blocked = false FROM next WHERE m.seq = next.seq RETURNING m.queue)
    SELECT array_agg(DISTINCT queue) INTO woken FROM freed;
    RETURN coalesce(woken, '{{}}');
END $$;

-- End the delays that are over, drop what has expired, a thousand of each. It waits for nobody: whether all of those
-- that expired could be dropped now, or some are another's business, whose transaction is open.
CREATE FUNCTION sweep(of_queue int) RETURNS boolean {INDEXED} AS $$
DECLARE
    now double precision := unix_now();
    gone bigint[];
    freed text[];
    locked text[];
    woken int[];
BEGIN
    IF EXISTS (SELECT 1 FROM messages m WHERE m.queue = of_queue AND m.due <= now) THEN
        UPDATE messages m SET due = NULL WHERE m.seq = ANY (ARRAY(
            SELECT d.seq FROM messages d WHERE d.queue = of_queue AND d.due <= now
            ORDER BY d.due LIMIT 1000 FOR UPDATE SKIP LOCKED));
    END IF;
    IF EXISTS (SELECT 1 FROM messages m WHERE m.queue = of_queue AND m.expires <= now AND m.owner IS NULL) THEN
        PERFORM 1 FROM queues q WHERE q.id = of_queue FOR NO KEY UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
        SELECT array_agg(e.seq), array_agg(DISTINCT e.line) FILTER (WHERE e.line IS NOT NULL) INTO gone, freed FROM (
            SELECT m.seq, m.line FROM messages m
            WHERE m.queue = of_queue AND m.expires <= now AND m.owner IS NULL ORDER BY m.expires LIMIT 1000) e;
        locked := try_stripes(freed);
        WITH expired AS (
            DELETE FROM messages m WHERE m.seq = ANY (ARRAY(
                SELECT e.seq FROM messages e
                WHERE e.seq = ANY (gone) AND e.queue = of_queue AND e.expires <= now AND e.owner IS NULL
                    AND (e.line IS NULL OR e.line = ANY (locked))
                ORDER BY e.seq FOR UPDATE SKIP LOCKED))
            RETURNING 1)
        UPDATE queues q SET expired = q.expired + e.n FROM (SELECT count(*) AS n FROM expired) e
        WHERE q.id = of_queue AND e.n > 0;
        woken := array_remove(go_on(locked), of_queue);
        IF woken <> '{{}}' THEN
            PERFORM tell('{{}}', woken);
        END IF;
    END IF;
    RETURN coalesce(cardinality(locked), 0) = coalesce(cardinality(freed), 0);
END $$;
"""
