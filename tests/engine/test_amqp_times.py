"""Times of messages on RabbitMQ: those that somebody else made up, and those that the server does not take."""

from __future__ import annotations

import time

import aiormq
import pytest
from pamqp.commands import Basic

from penstock import App, Message
from tests.helpers import eventually


@pytest.mark.parametrize("made_up", ["inf", "-inf", "nan", "1e300", "1e12"])
async def test_a_time_that_cannot_be_counts_as_none(amqp_url: str, made_up: str) -> None:
    app = App(amqp_url)
    seen: list[Message] = []

    @app.route("work")
    async def work(message: Message) -> None:
        seen.append(message)

    async with app, await aiormq.connect(amqp_url) as connection:
        channel = await connection.channel()
        for name in ("penstock-at", "penstock-due", "penstock-expires"):
            await channel.basic_publish(
                b"1", routing_key="work", properties=Basic.Properties(headers={name: made_up, "of": name})
            )
        await eventually(lambda: len(seen) == 3)
    assert {message.headers["of"] for message in seen} == {"penstock-at", "penstock-due", "penstock-expires"}
    assert all(abs(message.enqueued_at - time.time()) < 60 for message in seen)
    assert all(message.expires_at is None for message in seen)


async def test_an_expiry_in_many_years_is_kept_though_the_server_takes_none(amqp_url: str) -> None:
    app = App(amqp_url)
    seen: list[Message] = []

    @app.route("work")
    async def work(message: Message) -> None:
        seen.append(message)

    years = 50 * 365 * 86_400
    async with app:
        await app.publish("work", 1, expires=years)
        await eventually(lambda: seen)
    assert abs((seen[0].expires_at or 0.0) - time.time() - years) < 60
