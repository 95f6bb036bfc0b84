"""Claiming messages and settling them."""

from __future__ import annotations

from penstock.postgres.functions import INDEXED, OWN

CONSUMING = f"""
-- Up to `most` messages for a consumer, of each queue those behind `floors` first, of `most_bytes` in about. No
-- message: one row with `seq` 0 and in `place` the milliseconds until a look is worth while (null: when something
-- is told). A consumer that has been given up, or has another ticket by now: one row without `seq`.
-- Nothing is lost if a crash of the server undoes this: so it waits for no disk.
CREATE FUNCTION claim(consumer bigint, with_ticket bigint, from_queues int[], floors bigint[], most int,
                      most_bytes bigint)
RETURNS TABLE (seq bigint, place bigint, queue int, redelivered int, meta text, body bytea)
{INDEXED} SET plan_cache_mode TO force_generic_plan AS $$
DECLARE
    now double precision := unix_now();
    got int;
    taken int := 0;
    room bigint := most_bytes;
    size bigint;
    fitting bigint[];
    kept_from boolean := false;
    above bigint;
    wait bigint;
    upcoming double precision;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM 1 FROM consumers c WHERE c.id = consumer AND c.ticket = with_ticket FOR KEY SHARE;
    IF NOT FOUND THEN
        RETURN QUERY SELECT NULL::bigint, NULL::bigint, 0, 0, ''::text, ''::bytea;
        RETURN;
    END IF;
    FOR i IN 1 .. cardinality(from_queues) LOOP
        EXIT WHEN taken >= most OR room <= 0;
        kept_from := NOT sweep(from_queues[i]) OR kept_from;
        CONTINUE WHEN (SELECT q.paused FROM queues q WHERE q.id = from_queues[i]);
        above := floors[i];
        LOOP
            WITH found AS MATERIALIZED (
                SELECT m.seq, m.place, octet_length(m.body) AS size FROM messages m
                WHERE m.queue = from_queues[i] AND m.place > above
                    AND m.owner IS NULL AND m.due IS NULL AND NOT m.blocked
                    AND (m.expires IS NULL OR m.expires > now)
                ORDER BY m.place LIMIT most - taken FOR UPDATE SKIP LOCKED)
            SELECT array_agg(f.seq), sum(f.size) INTO fitting, size FROM (
                SELECT f.seq, f.size, sum(f.size) OVER (ORDER BY f.place) - f.size AS before FROM found f) f
            WHERE f.before < room;
            RETURN QUERY UPDATE messages m SET owner = consumer WHERE m.seq = ANY (fitting)
                RETURNING m.seq, m.place, m.queue, m.redelivered, m.meta, m.body;
            GET DIAGNOSTICS got = ROW_COUNT;
            taken := taken + got;
            room := room - coalesce(size, 0);
            EXIT WHEN above = 0 OR taken >= most OR room <= 0;
            above := 0;
        END LOOP;
    END LOOP;
    IF taken = 0 THEN
        SELECT min(t.at) INTO upcoming FROM unnest(from_queues) q (id) CROSS JOIN LATERAL (
            (SELECT m.due AS at FROM messages m WHERE m.queue = q.id AND m.due IS NOT NULL ORDER BY m.due LIMIT 1)
            UNION ALL
            (SELECT m.expires FROM messages m WHERE m.queue = q.id AND m.expires IS NOT NULL AND m.owner IS NULL
             ORDER BY m.expires LIMIT 1)) t;
        wait := CASE WHEN upcoming IS NOT NULL
            THEN ceil(greatest(upcoming - unix_now(), CASE WHEN kept_from THEN 0.1 ELSE 0 END) * 1000) END;
        RETURN QUERY SELECT 0::bigint, wait, 0, 0, ''::text, ''::bytea;
    END IF;
END $$;

-- After a claim of which nobody knows whether it was carried out, or still will be: from now on another ticket is
-- needed, and what the consumer has beyond `held` is free again. Whether it still lives. Done after a later one it
-- does nothing.
CREATE FUNCTION reclaim(consumer bigint, held bigint[], new_ticket bigint) RETURNS boolean {OWN} AS $$
DECLARE
    its_queues int[];
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM 1 FROM consumers c WHERE c.id = consumer FOR UPDATE;  -- after a claim under way
    UPDATE consumers c SET ticket = new_ticket WHERE c.id = consumer AND c.ticket < new_ticket
        RETURNING c.queues INTO its_queues;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM free(consumer, its_queues, held, false);
    RETURN true;
END $$;

-- Carry out settlements of what a consumer holds. `gone`: what it does not hold (any more). `fresh`, `back`: where
-- others may find something now. `missing`: a queue that is not declared; then nothing was done.
CREATE FUNCTION settle(consumer bigint, in_order boolean, acks bigint[], released bigint[], pauses double precision[],
                       moved bigint[], targets text[], priorities smallint[], delays double precision[],
                       expiries double precision[], keys text[], metas text[], bodies bytea[],
                       OUT alive boolean, OUT gone bigint[], OUT back int[], OUT missing text) {INDEXED} AS $$
DECLARE
    now double precision := unix_now();
    all_lines text[];
    done bigint[];
    part bigint[];
    woken int[];
BEGIN
    alive := EXISTS (SELECT 1 FROM consumers c WHERE c.id = consumer);
    gone := '{{}}';
    back := '{{}}';
    IF moved <> '{{}}' THEN
        SELECT min(t.name) INTO missing FROM unnest(targets) t (name) LEFT JOIN queues q ON q.name = t.name
            WHERE q.id IS NULL;
        IF missing IS NOT NULL THEN
            RETURN;
        END IF;
        in_order := in_order OR EXISTS (SELECT 1 FROM queues q WHERE q.name = ANY (targets) AND q.ordered);
    END IF;
    IF in_order THEN
        all_lines := ARRAY(
            SELECT m.line FROM messages m
            WHERE m.seq = ANY (acks || moved) AND m.owner = consumer AND m.line IS NOT NULL
            UNION
            SELECT q.base || ':' || t.key FROM unnest(targets, keys) t (name, key) JOIN queues q ON q.name = t.name
            WHERE q.ordered AND t.key IS NOT NULL);
        PERFORM lock_stripes(all_lines);
    END IF;
    IF acks <> '{{}}' THEN
        WITH d AS (DELETE FROM messages m WHERE m.seq = ANY (acks) AND m.owner = consumer RETURNING m.seq)
        SELECT array_agg(d.seq) INTO done FROM d;
    END IF;
    IF released <> '{{}}' THEN
        WITH d AS (
            UPDATE messages m SET owner = NULL, due = CASE WHEN r.pause > 0 THEN now + r.pause END
            FROM unnest(released, pauses) r (seq, pause) WHERE m.seq = r.seq AND m.owner = consumer
            RETURNING m.seq, m.queue)
        SELECT array_agg(d.seq), coalesce(array_agg(DISTINCT d.queue), '{{}}') INTO part, back FROM d;
        done := done || part;
    END IF;
    IF moved <> '{{}}' THEN
        WITH d AS (
            UPDATE messages m SET queue = t.queue, priority = t.priority, owner = NULL, due = now + t.delay,
                expires = t.expires, line = t.line, redelivered = 0, meta = t.meta, body = t.body,
                blocked = CASE WHEN t.line IS NOT DISTINCT FROM m.line THEN m.blocked ELSE t.line IS NOT NULL END
            FROM (
                SELECT t.*, q.id AS queue, CASE WHEN q.ordered THEN q.base || ':' || t.key END AS line
                FROM unnest(moved, targets, priorities, delays, expiries, keys, metas, bodies)
                    t (seq, name, priority, delay, expires, key, meta, body)
                JOIN queues q ON q.name = t.name) t
            WHERE m.seq = t.seq AND m.owner = consumer RETURNING m.seq, m.queue)
        SELECT array_agg(d.seq), coalesce(array_agg(DISTINCT d.queue), '{{}}') INTO part, woken FROM d;
        done := done || part;
        back := back || woken;
    END IF;
    IF all_lines <> '{{}}' THEN
        back := back || go_on(all_lines);
    END IF;
    IF coalesce(cardinality(done), 0) < cardinality(acks) + cardinality(released) + cardinality(moved) THEN
        gone := ARRAY(SELECT unnest(acks || released || moved) EXCEPT SELECT unnest(done));
    END IF;
END $$;
"""
