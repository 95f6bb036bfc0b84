"""Queues, publishing to them, and what an operator may do."""

from __future__ import annotations

from penstock.postgres.functions import INDEXED, OWN
from penstock.postgres.tables import IS_NOT_READY, IS_READY

QUEUES = f"""
-- The id of a queue, and whether it is ordered.
CREATE FUNCTION declare(wanted text, topics text[], to_order boolean, beside text, ceiling int,
                        OUT id int, OUT ordered boolean) {OWN} AS $$
BEGIN
    SELECT q.id, q.ordered INTO id, ordered FROM queues q WHERE q.name = wanted;
    IF id IS NULL THEN
        INSERT INTO queues AS q (name, ordered, base, max_length)
            VALUES (wanted, to_order, coalesce((SELECT b.base FROM queues b WHERE b.name = beside), 0), ceiling)
            ON CONFLICT (name) DO NOTHING;
        SELECT q.id, q.ordered INTO id, ordered FROM queues q WHERE q.name = wanted;
        UPDATE queues q SET base = q.id WHERE q.id = declare.id AND q.base = 0;
    END IF;
    IF ordered = to_order THEN
        INSERT INTO bindings (topic, queue) SELECT DISTINCT t, declare.id FROM unnest(wanted || topics) t
        WHERE NOT EXISTS (SELECT 1 FROM bindings b WHERE b.topic = t AND b.queue = declare.id)
        ON CONFLICT DO NOTHING;
    END IF;
END $$;

-- Store messages, `names[topic]` being the topic of each; the queues they went to, and which were refused, with
-- the name and length of the queue that is full (none: to nothing is that topic bound). Which queues those are is
-- looked up once: one that is unbound meanwhile gets its copy, or what was admitted might go nowhere. Nothing is
-- done, and `isolation` says why, where what others commit meanwhile would not be seen and has to be.
CREATE FUNCTION publish(names text[], topics int[], priorities smallint[], delays double precision[],
                        expiries double precision[], keys text[], metas text[], bodies bytea[], told boolean,
                        OUT fresh int[], OUT refused int[], OUT full_names text[], OUT full_lengths int[],
                        OUT isolation text)
{OWN} AS $$
DECLARE
    now double precision := unix_now();
    bound int;
    from_topics int[];
    to_queues int[];
    accepted boolean[];
    limited boolean;
    in_order boolean;
BEGIN
    SELECT coalesce(array_agg(DISTINCT q.id), '{{}}'), count(DISTINCT n.topic),
           coalesce(bool_or(q.max_length IS NOT NULL), false), coalesce(bool_or(q.ordered), false),
           coalesce(array_agg(n.topic::int), '{{}}'), coalesce(array_agg(q.id), '{{}}')
        INTO fresh, bound, limited, in_order, from_topics, to_queues
        FROM unnest(names) WITH ORDINALITY n (name, topic)
        JOIN bindings b ON b.topic = n.name JOIN queues q ON q.id = b.queue;
    IF (limited OR in_order) AND current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        isolation := current_setting('transaction_isolation');
        RETURN;
    END IF;
    IF bound < cardinality(names) OR limited THEN
        SELECT a.accepted, a.refused, a.full_names, a.full_lengths
            INTO accepted, refused, full_names, full_lengths FROM admit(topics, from_topics, to_queues, limited) a;
    END IF;
    IF in_order THEN
        PERFORM lock_stripes(ARRAY(
            SELECT q.base || ':' || m.key FROM unnest(topics, keys) m (topic, key)
            JOIN unnest(from_topics, to_queues) b (topic, queue) ON b.topic = m.topic JOIN queues q ON q.id = b.queue
            WHERE q.ordered AND m.key IS NOT NULL));
        INSERT INTO messages (queue, priority, due, expires, line, blocked, meta, body)
        SELECT m.queue, m.priority, now + m.delay, m.expires, m.line,
               m.line IS NOT NULL AND (m.nth > 1 OR EXISTS (SELECT 1 FROM messages o WHERE o.line = m.line)),
               m.meta, m.body
        FROM (
            SELECT m.*, l.line, q.id AS queue, row_number() OVER (PARTITION BY l.line ORDER BY m.ord, q.id) AS nth
            FROM unnest(topics, priorities, delays, expiries, keys, metas, bodies)
                WITH ORDINALITY m (topic, priority, delay, expires, key, meta, body, ord)
            JOIN unnest(from_topics, to_queues) b (topic, queue) ON b.topic = m.topic JOIN queues q ON q.id = b.queue
            CROSS JOIN LATERAL (SELECT CASE WHEN q.ordered THEN q.base || ':' || m.key END AS line) l
            WHERE accepted IS NULL OR accepted[m.ord]) m
        ORDER BY m.ord, m.queue;
    ELSE
        INSERT INTO messages (queue, priority, due, expires, meta, body)
        SELECT b.queue, m.priority, now + m.delay, m.expires, m.meta, m.body
        FROM unnest(topics, priorities, delays, expiries, metas, bodies)
            WITH ORDINALITY m (topic, priority, delay, expires, meta, body, ord)
        JOIN unnest(from_topics, to_queues) b (topic, queue) ON b.topic = m.topic
        WHERE accepted IS NULL OR accepted[m.ord]
        ORDER BY m.ord, b.queue;
    END IF;
    IF told AND fresh <> '{{}}' THEN
        PERFORM tell('{{}}', fresh);
    END IF;
END $$;

-- Which messages have somewhere to go, and a place in each queue that has a ceiling. Those queues stay locked.
CREATE FUNCTION admit(topics int[], from_topics int[], to_queues int[], limited boolean, OUT accepted boolean[],
                      OUT refused int[], OUT full_names text[], OUT full_lengths int[]) {INDEXED} AS $$
DECLARE
    room jsonb := '{{}}';
    targets jsonb;
    one record;
    target int;
    full_one int;
BEGIN
    accepted := array_fill(true, ARRAY[cardinality(topics)]);
    IF limited THEN
        FOR one IN SELECT q.id, q.max_length FROM queues q WHERE q.max_length IS NOT NULL
                AND q.id = ANY (to_queues)
                ORDER BY q.id FOR NO KEY UPDATE LOOP
            PERFORM sweep(one.id);
            room := room || jsonb_build_object(one.id::text, one.max_length - (
                SELECT count(*) FROM (
                    SELECT 1 FROM (SELECT 1 FROM messages m WHERE m.queue = one.id AND {IS_READY}) r
                    UNION ALL
                    SELECT 1 FROM (SELECT 1 FROM messages m WHERE m.queue = one.id AND {IS_NOT_READY}) r
                    LIMIT one.max_length) c));
        END LOOP;
    END IF;
    SELECT coalesce(jsonb_object_agg(t.topic, t.queues), '{{}}') INTO targets FROM (
        SELECT b.topic, jsonb_agg(b.queue) AS queues FROM unnest(from_topics, to_queues) b (topic, queue)
        GROUP BY b.topic) t;
    FOR i IN 1 .. cardinality(topics) LOOP
        IF NOT targets ? topics[i]::text THEN
            accepted[i] := false;
            refused := refused || i;
            full_names := full_names || NULL::text;
            full_lengths := full_lengths || NULL::int;
            CONTINUE;
        END IF;
        CONTINUE WHEN NOT limited;
        full_one := NULL;
        FOR target IN SELECT t::int FROM jsonb_array_elements_text(targets -> topics[i]::text) t ORDER BY t::int LOOP
            IF (room -> target::text)::int <= 0 THEN
                full_one := target;
                EXIT;
            END IF;
        END LOOP;
        IF full_one IS NOT NULL THEN
            accepted[i] := false;
            refused := refused || i;
            full_names := full_names || (SELECT q.name FROM queues q WHERE q.id = full_one);
            full_lengths := full_lengths || (SELECT q.max_length FROM queues q WHERE q.id = full_one);
        ELSE
            FOR target IN SELECT t::int FROM jsonb_array_elements_text(targets -> topics[i]::text) t LOOP
                IF room ? target::text THEN
                    room := room || jsonb_build_object(target::text, (room -> target::text)::int - 1);
                END IF;
            END LOOP;
        END IF;
    END LOOP;
END $$;
CREATE FUNCTION purge(of_queue int) RETURNS bigint {INDEXED} AS $$
DECLARE
    removed bigint;
    freed text[];
    locked text[] := '{{}}';
BEGIN
    IF (SELECT q.ordered FROM queues q WHERE q.id = of_queue) THEN
        locked := ARRAY(
            SELECT DISTINCT m.line FROM messages m
            WHERE m.queue = of_queue AND m.owner IS NULL AND m.line IS NOT NULL);
        PERFORM lock_stripes(locked);
    END IF;
    WITH gone AS (
        DELETE FROM messages m WHERE m.seq = ANY (ARRAY(
            SELECT r.seq FROM messages r WHERE r.queue = of_queue AND {IS_READY}
            UNION ALL
            SELECT r.seq FROM messages r WHERE r.queue = of_queue AND {IS_NOT_READY} AND r.owner IS NULL))
        AND m.queue = of_queue AND m.owner IS NULL AND (m.line IS NULL OR m.line = ANY (locked)) RETURNING m.line)
    SELECT count(*), array_agg(DISTINCT g.line) FILTER (WHERE g.line IS NOT NULL) INTO removed, freed FROM gone g;
    UPDATE queues q SET discarded = q.discarded + removed WHERE q.id = of_queue;
    PERFORM tell('{{}}', of_queue || go_on(freed));
    RETURN removed;
END $$;

CREATE FUNCTION pause(of_queue int, paused boolean) RETURNS void {OWN} AS $$
BEGIN
    UPDATE queues q SET paused = $2 WHERE q.id = of_queue;
    PERFORM tell('{{}}', ARRAY[of_queue]);
END $$;
"""
