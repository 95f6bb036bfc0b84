"""Consumers and inboxes: joining, staying alive, being given up; and what is said to those who live."""

from __future__ import annotations

from penstock.postgres.functions import INDEXED, OWN

LIVES = f"""
CREATE FUNCTION join_queues(names text[], for_seconds double precision, OUT consumer bigint, OUT ids int[],
                            OUT in_order boolean[], OUT missing text) {OWN} AS $$
BEGIN
    SELECT array_agg(q.id ORDER BY n.ord), array_agg(q.ordered ORDER BY n.ord), min(n.name) FILTER (WHERE q.id IS NULL)
        INTO ids, in_order, missing
        FROM unnest(names) WITH ORDINALITY n (name, ord) LEFT JOIN queues q ON q.name = n.name;
    IF missing IS NULL THEN
        INSERT INTO consumers (deadline, lease, queues) VALUES (unix_now() + for_seconds, for_seconds, ids)
            RETURNING id INTO consumer;
    END IF;
END $$;

-- Everything that a consumer holds, but for `kept`, is free again; it must be locked, or deleted.
CREATE FUNCTION free(consumer bigint, its_queues int[], kept bigint[], lost boolean) RETURNS void {INDEXED} AS $$
DECLARE
    woken int[];
BEGIN
    WITH freed AS (
        UPDATE messages m SET owner = NULL, redelivered = m.redelivered + lost::int,
            expires = CASE WHEN NOT lost THEN m.expires END  -- what was taken in time expires no more
        WHERE m.seq = ANY (ARRAY(
            SELECT h.seq FROM messages h WHERE h.queue = ANY (its_queues)
                AND (h.owner IS NOT NULL OR h.due IS NOT NULL OR h.blocked) AND h.owner = consumer
                AND h.seq <> ALL (kept) ORDER BY h.seq))
        RETURNING m.queue)
    SELECT array_agg(DISTINCT f.queue) INTO woken FROM freed f;
    IF woken IS NOT NULL THEN
        PERFORM tell('{{}}', woken);
    END IF;
END $$;

CREATE FUNCTION leave(consumer bigint) RETURNS void {OWN} AS $$
DECLARE
    its_queues int[];
BEGIN
    DELETE FROM consumers c WHERE c.id = consumer RETURNING c.queues INTO its_queues;  -- after a claim under way
    IF FOUND THEN
        PERFORM free(consumer, its_queues, '{{}}', false);
    END IF;
END $$;

-- Say that these live; which of them still counted as alive, and in how many seconds the next of all will be overdue.
-- Those that are now are given up; but after a start of the server everybody has a lease to come back.
CREATE FUNCTION beat(mine bigint[], my_inboxes bigint[], OUT alive bigint[], OUT living bigint[],
                     OUT upcoming double precision) {OWN} AS $$
DECLARE
    now double precision := unix_now();
    up double precision := extract(epoch FROM pg_postmaster_start_time());
    dead record;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    WITH b AS (UPDATE consumers c SET deadline = now + c.lease WHERE c.id = ANY (mine) RETURNING c.id)
    SELECT coalesce(array_agg(b.id), '{{}}') INTO alive FROM b;
    WITH b AS (UPDATE inboxes i SET deadline = now + i.lease WHERE i.id = ANY (my_inboxes) RETURNING i.id)
    SELECT coalesce(array_agg(b.id), '{{}}') INTO living FROM b;
    FOR dead IN SELECT c.id, c.queues FROM consumers c
            WHERE c.deadline < now AND up + c.lease < now FOR UPDATE SKIP LOCKED LOOP
        PERFORM free(dead.id, dead.queues, '{{}}', true);
        DELETE FROM consumers c WHERE c.id = dead.id;
    END LOOP;
    FOR dead IN SELECT i.id FROM inboxes i WHERE i.deadline < now AND up + i.lease < now FOR UPDATE SKIP LOCKED LOOP
        PERFORM close_inbox(dead.id);
    END LOOP;
    PERFORM sweep_mail();
    SELECT min(greatest(c.deadline, up + c.lease)) - now INTO upcoming FROM consumers c WHERE c.id <> ALL (mine);
END $$;

-- Whether the inbox is new.
CREATE FUNCTION listen(inbox bigint, to_topics text[], for_seconds double precision) RETURNS boolean {OWN} AS $$
DECLARE
    now double precision := unix_now();
BEGIN
    UPDATE inboxes i SET topics = to_topics, deadline = now + for_seconds WHERE i.id = inbox;
    IF FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO inboxes (id, deadline, lease, topics) VALUES (inbox, now + for_seconds, for_seconds, to_topics);
    RETURN true;
END $$;

CREATE FUNCTION close_inbox(inbox bigint) RETURNS void {OWN} AS $$
BEGIN
    DELETE FROM inboxes i WHERE i.id = $1;
    DELETE FROM mail m WHERE m.inbox = $1;
END $$;

-- Mail that was on its way to an inbox while that was closed.
CREATE FUNCTION sweep_mail() RETURNS void {INDEXED} AS $$
DECLARE
    one bigint;
BEGIN
    LOOP
        SELECT min(m.inbox) INTO one FROM mail m WHERE m.inbox > coalesce(one, 0);
        EXIT WHEN one IS NULL;
        IF NOT EXISTS (SELECT 1 FROM inboxes i WHERE i.id = one) THEN
            DELETE FROM mail m WHERE m.inbox = one;
        END IF;
    END LOOP;
END $$;

CREATE FUNCTION broadcast(about text, meta text, body bytea) RETURNS void {OWN} AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    WITH sent AS (
        INSERT INTO mail (inbox, meta, body) SELECT i.id, $2, $3 FROM inboxes i WHERE about = ANY (i.topics)
        RETURNING mail.inbox)
    SELECT count(pg_notify('penstock:inbox-' || to_hex(s.inbox), '')) FROM sent s INTO about;
END $$;

CREATE FUNCTION reply(addresses bigint[], metas text[], bodies bytea[]) RETURNS void {OWN} AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    INSERT INTO mail (inbox, meta, body)
        SELECT r.inbox, r.meta, r.body FROM unnest(addresses, metas, bodies) WITH ORDINALITY r (inbox, meta, body, ord)
        WHERE EXISTS (SELECT 1 FROM inboxes i WHERE i.id = r.inbox) ORDER BY r.ord;
    PERFORM pg_notify('penstock:inbox-' || to_hex(a.inbox), '') FROM (SELECT DISTINCT unnest(addresses) AS inbox) a;
END $$;

CREATE FUNCTION fetch_mail(inboxes bigint[]) RETURNS TABLE (inbox bigint, seq bigint, meta text, body bytea)
{INDEXED} AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    RETURN QUERY DELETE FROM mail m WHERE m.inbox = ANY (inboxes) RETURNING m.inbox, m.seq, m.meta, m.body;
END $$;
"""
