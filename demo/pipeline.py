"""A pipeline that loses nothing: readings from any number of sources, stored by one route, watched by another.

To add a source, publish to the topic "readings" from wherever it is, as `demo/sensors.py` does: nothing
in this file changes. To add a consumer, write one more route with a queue of its own and
`topics=["readings"]`: it gets every reading from then on, and neither the sources nor the other routes
know of it. Each queue keeps its own copy, so one consumer's trouble is never another's.
"""

import sqlite3
from contextlib import closing
from dataclasses import dataclass

from demo.database import ALERTS, READINGS, connect
from demo.ledger import witnessed
from penstock import App, Message, Unavailable, context

# A killed consumer's messages go to the next one after `lease` seconds of silence: 30 unless told, 2 to keep
# the demo short.
app = App(lease=2)

PREFETCH = 40  # received and not yet acknowledged, at most: what a kill can make come twice


@dataclass
class Reading:
    sensor: str
    value: float
    unit: str
    at: float  # Unix seconds


@app.route("store", topics=["readings"], bulk_size=20, bulk_timeout=0.5, prefetch=PREFETCH, backoff=(0.2, 1))
def store(messages: list[Message]) -> None:
    """Returns once the database has the rows; only then does Penstock acknowledge the messages."""
    rows = [{"id": message.id, "attempt": message.attempt, **message.body} for message in messages]
    with witnessed(messages):  # the demo's eye, for the proof at the end; yours does without
        try:
            with closing(connect(READINGS)) as database, database:
                database.executemany("INSERT INTO readings VALUES (:id, :attempt, :sensor, :value, :unit, :at)", rows)
        except sqlite3.OperationalError as error:
            # Not the messages' fault: they wait in their queue, and no attempt is counted.
            raise Unavailable(f"the readings' database: {error}") from error


@app.route("alerts", topics=["readings"], prefetch=PREFETCH)
def alert(reading: Reading) -> None:
    """Compares each reading with the average of its sensor so far, which outlives this process."""
    with closing(connect(ALERTS)) as database, database:
        seen = "SELECT count(*), avg(value) FROM seen WHERE sensor = ?"
        count, average = database.execute(seen, (reading.sensor,)).fetchone()
        row = (context.message.id, reading.sensor, reading.value)
        database.execute("INSERT INTO seen VALUES (?, ?, ?)", row)
        if reading.sensor == "cpu" and count >= 10 and reading.value > 1.5 * average:
            database.execute("INSERT INTO alerts VALUES (?, ?, ?, ?, ?)", (*row, average, reading.at))


if __name__ == "__main__":
    app.run()
