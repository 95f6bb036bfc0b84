"""Publishing: on a connection of ours, or inside a transaction of the caller's."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock.brokers.postgres.encoding import columns
from penstock.brokers.postgres.sql import PUBLISH_TYPES, Statements
from penstock.errors import PublishError, QueueFull, Unroutable
from penstock.message import Outgoing

if TYPE_CHECKING:
    from asyncpg import Connection


def arguments(messages: Sequence[Outgoing], told: bool) -> tuple[Any, ...]:
    """Of the function `publish`. `told`: it tells consumers by itself, when the transaction is committed."""
    names: dict[str, int] = {}
    topics = [names.setdefault(message.topic, len(names) + 1) for message in messages]
    return (list(names), topics, *columns(messages), told)


def outcomes(messages: Sequence[Outgoing], row: Any) -> list[PublishError | None]:
    """What became of each message, by the row that `publish` returned."""
    found: list[PublishError | None] = [None] * len(messages)
    for at, name, length in zip(row["refused"] or (), row["full_names"] or (), row["full_lengths"] or (), strict=True):
        found[at - 1] = Unroutable(messages[at - 1].topic) if name is None else QueueFull(name, length)
    return found


async def publish_within(
    statements: Statements, messages: Sequence[Outgoing], transaction: Any
) -> list[PublishError | None]:
    """Publish on a connection of asyncpg or psycopg 3 that is in a transaction. It takes part in that, and nothing
    else is done to the connection.

    :raises TypeError: another kind of connection.
    :raises ValueError: it is in no transaction, or in one that would not see what it has to.
    """
    given = arguments(messages, told=True)
    driver = type(transaction).__module__.partition(".")[0]
    if driver == "asyncpg" and hasattr(transaction, "fetchrow"):
        return outcomes(messages, _seeing(await _on_asyncpg(statements, transaction, given)))
    if driver == "psycopg" and hasattr(transaction, "cursor"):
        return outcomes(messages, _seeing(await _on_psycopg(statements, transaction, given)))
    raise TypeError(f"transaction= takes a connection of asyncpg or psycopg 3, not {type(transaction).__qualname__}")


def _seeing(row: Any) -> Any:
    """The row, unless `publish` refused the transaction: nothing was done then, and it goes on as it was."""
    if row["isolation"] is not None:
        raise ValueError(
            f"the transaction is {row['isolation'].upper()}: to a queue that is ordered, or has max_length, messages "
            "are published at READ COMMITTED"
        )
    return row


async def _on_asyncpg(statements: Statements, connection: Connection, given: tuple[Any, ...]) -> Any:
    if not connection.is_in_transaction():
        raise ValueError("the connection is in no transaction: begin one, async with connection.transaction(): …")
    return await connection.fetchrow(statements.publish, *given)


async def _on_psycopg(statements: Statements, connection: Any, given: tuple[Any, ...]) -> Any:
    from psycopg.pq import TransactionStatus
    from psycopg.rows import dict_row

    if connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
        raise ValueError("the connection is in no transaction: begin one, async with connection.transaction(): …")
    parameters = ", ".join(f"%s::{kind}" for kind in PUBLISH_TYPES)
    statement = f"SELECT * FROM {statements.publish_function.replace('%', '%%')}({parameters})"  # noqa: S608 - quoted
    cursor = connection.cursor(row_factory=dict_row)
    if inspect.iscoroutinefunction(cursor.execute):
        await cursor.execute(statement, given)
        row = await cursor.fetchone()
    else:
        await asyncio.to_thread(cursor.execute, statement, given)
        row = cursor.fetchone()
    return row
