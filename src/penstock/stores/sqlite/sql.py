"""Every statement, named.

Many keys travel as one JSON list, many entries come back as one concatenated row: Python's driver gives
up the GIL at each row it steps over, and getting it back from a busy event loop costs more than the row.
"""

from __future__ import annotations

from penstock.sqlite.schema import NEVER

_LISTED = "IN (SELECT value FROM json_each(?))"

# -- looking; an entry that has expired may still be there

GET_ONE = "SELECT version, expires, value FROM entries WHERE key = ? AND expires > ?"
_CONTENT = """
    SELECT '[' || group_concat('[' || {name} || ',' || e.version || ',' || e.expires || ','
                               || length(e.value) || ']') || ']',
           CAST(group_concat(e.value, '') AS BLOB)
    FROM """
GET = (
    _CONTENT.format(name="j.key")  # the place in the list
    + "json_each(?) j CROSS JOIN entries e ON e.key = j.value WHERE e.expires > ?"
)
_SCAN = _CONTENT.format(name="json_quote(e.key)") + (
    "(SELECT * FROM entries WHERE key >= ? AND key < ? AND expires > ? ORDER BY key {order} LIMIT ?) e"
)
SCAN_UP = _SCAN.format(order="ASC")
SCAN_DOWN = _SCAN.format(order="DESC")
VERSION_OF_ONE = "SELECT version FROM entries WHERE key = ? AND expires > ?"
VERSIONS = """
    SELECT '[' || group_concat('[' || j.key || ',' || e.version || ']') || ']'
    FROM json_each(?) j CROSS JOIN entries e ON e.key = j.value WHERE e.expires > ?"""

# -- changing

# One count for all keys and processes, so that what was deleted need not be remembered. Raised once for
# all puts of a batch it costs 2 µs; AUTOINCREMENT would count by itself, but only for a row that is
# written anew, which takes twice as long as one that is written over.
RESERVE_VERSIONS = "UPDATE versions SET last = last + ? RETURNING last"
PUT = "INSERT INTO entries (key, version, expires, value) VALUES "
PUT_ROW = "(?, ?, ?, ?)"
PUT_OVER = """
    ON CONFLICT (key) DO UPDATE SET version = excluded.version, expires = excluded.expires, value = excluded.value"""
DELETE = f"DELETE FROM entries WHERE key {_LISTED}"
TOUCH = f"UPDATE entries SET expires = ? WHERE key {_LISTED}"

# -- sweeping; the first of what has expired, up to so many and so large

EXPIRED = f"""
    SELECT json_group_array(id) FILTER (WHERE before < ?), count(*) FROM (
        SELECT id, sum(size) OVER (ORDER BY expires, id ROWS UNBOUNDED PRECEDING) - size AS before FROM (
            SELECT id, expires, length(value) AS size FROM entries
            WHERE expires < {NEVER} AND expires <= ? ORDER BY expires, id LIMIT ?))"""
REMOVE = f"DELETE FROM entries WHERE id {_LISTED}"

# -- following

DATA_VERSION = "PRAGMA data_version"
