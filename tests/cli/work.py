"""An app with tasks for the tests of the command line, which run it in processes of its own."""

import asyncio
import os
from typing import Any

from penstock import App, Task, context

app = App(lease=2, grace=1)


def say(*words: object) -> None:
    with open("said", "a") as file:
        print(*words, file=file)


@app.task
async def add(x: int, y: int) -> int:
    return x + y


@app.task
async def echo(value: Any) -> Any:
    return value


@app.task
async def headers(value: Any) -> Any:
    return context.message.headers | {"priority": context.message.priority}


@app.task
async def raw(value: Any) -> bytes:
    return b"\xff\x00"


@app.task(topics=["hello"])
async def greet(task: Task) -> str:
    return f"hello {task.content['name']}"


@app.task(topics=["hello"])
async def audit(task: Task) -> str:
    if not os.path.exists("fine"):
        raise ValueError("no \x1b[31mgood\nat all")
    return "fine"


@app.task(backoff=(0, 0))
async def flaky(value: Any) -> None:
    say("tried", value)
    raise LookupError(value)


@app.task
async def linger(value: Any) -> None:
    say("lingering", value)
    if value != "quiet":
        context.progress(3, 10)
    try:
        await asyncio.sleep(1000)
    finally:
        say("stopped", value)


if __name__ == "__main__":
    app.run()
