"""The store."""

from __future__ import annotations

from penstock.postgres.functions import INDEXED

ENTRIES = f"""
-- Make changes (0 put, 1 delete, 2 touch), those to a key in their order, and all in the order of their keys: so
-- none waits for another in a circle. What is deleted stays as something expired for a while, so that a version is
-- always taken under the lock of a row, and a later one is larger.
CREATE FUNCTION change(kinds int[], names text[], vals bytea[], ttls double precision[], expected bigint[],
                       tells boolean[]) RETURNS bigint[] {INDEXED} AS $$
DECLARE
    now double precision := unix_now();
    outcomes bigint[] := array_fill(NULL::bigint, ARRAY[cardinality(kinds)]);
    told text[] := '{{}}';
    one record;
    old_version bigint;
    old_expires double precision;
    until double precision;
    there boolean;
    outcome bigint;
BEGIN
    FOR one IN SELECT * FROM unnest(kinds, names, vals, ttls, expected, tells) WITH ORDINALITY
            c (kind, key, value, ttl, expect, tell, ord) ORDER BY c.key COLLATE "C", c.ord LOOP
        until := CASE WHEN one.ttl IS NULL OR one.ttl > 1e12 THEN 'Infinity' ELSE now + one.ttl END;
        LOOP
            outcome := NULL;
            SELECT e.version, e.expires INTO old_version, old_expires FROM entries e WHERE e.key = one.key FOR UPDATE;
            there := FOUND;
            now := unix_now();  -- while we waited for the lock somebody may have deleted it
            IF one.kind = 2 THEN
                IF there AND old_expires > now THEN
                    UPDATE entries e SET expires = until WHERE e.key = one.key;
                    outcome := old_version;
                END IF;
            ELSIF one.expect <> (CASE WHEN there AND old_expires > now THEN old_version ELSE 0 END) THEN
                NULL;
            ELSIF one.kind = 1 THEN
                IF there THEN
                    UPDATE entries e SET expires = least(e.expires, now), value = '' WHERE e.key = one.key;
                END IF;
                outcome := 0;
            ELSIF there THEN
                UPDATE entries e SET version = nextval('versions'), expires = until, value = one.value
                    WHERE e.key = one.key RETURNING e.version INTO outcome;
            ELSE
                INSERT INTO entries AS e (key, version, expires, value)
                    VALUES (one.key, nextval('versions'), until, one.value)
                    ON CONFLICT (key) DO NOTHING RETURNING e.version INTO outcome;
                CONTINUE WHEN outcome IS NULL;  -- another was quicker: look again
            END IF;
            EXIT;
        END LOOP;
        outcomes[one.ord] := outcome;
        IF one.tell AND outcome IS NOT NULL AND (told = '{{}}' OR told[cardinality(told)] <> one.key) THEN
            told := told || one.key;
        END IF;
    END LOOP;
    IF told <> '{{}}' THEN  -- a notification holds less than 8000 bytes
        PERFORM pg_notify('penstock-keys:' || current_schema(), CASE WHEN size > 7000 THEN '' ELSE keys END)
        FROM (SELECT json_agg(t.key)::text AS keys, octet_length(json_agg(t.key)::text) AS size
              FROM unnest(told) WITH ORDINALITY t (key, ord) GROUP BY (t.ord - 1) / 50) parts;
    END IF;
    RETURN outcomes;
END $$;

CREATE FUNCTION sweep_entries() RETURNS int {INDEXED} AS $$
DECLARE
    removed int;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    DELETE FROM entries e WHERE e.key = ANY (ARRAY(
        SELECT o.key FROM entries o WHERE o.expires < 'Infinity' AND o.expires < unix_now() - 60
        ORDER BY o.expires LIMIT 1000 FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN removed;
END $$;
"""
