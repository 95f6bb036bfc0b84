"""`penstock publish`."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from penstock.cli import bodies
from penstock.cli.bodies import Headers, Priority, seconds
from penstock.cli.command import Call, UsageError
from penstock.cli.output import Advance, note, print_json, progress
from penstock.client import SyncClient
from penstock.client.client import MAX_BODY
from penstock.control.brokers import require_files
from penstock.errors import BodyTooLarge, InvalidMessage, PenstockError, PublishError, PublishTimeout

READ = 256 * 1024  # bytes asked of stdin; what there is goes out, so that a slow source is not held up
CHUNK = 1000  # messages published in one round trip


def publish(
    call: Call,
    name: Annotated[
        str, typer.Argument(metavar="NAME", callback=bodies.name, help="A queue, or a topic that queues are bound to.")
    ],
    body: Annotated[
        str | None, typer.Argument(metavar="JSON|-", help="The body; `-` reads one a line from stdin; none is null.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Ordering key.")] = None,
    priority: Priority = 0,
    delay: Annotated[
        float | None, typer.Option(min=0, callback=seconds, metavar="SECONDS", help="Not before then.")
    ] = None,
    expires: Annotated[
        float | None, typer.Option(min=0, callback=seconds, metavar="SECONDS", help="Dropped if untaken by then.")
    ] = None,
    header: Headers = None,
    id: Annotated[str | None, typer.Option(help="The message's id, in place of a random one.")] = None,
) -> None:
    """Publish one message, or one for each line of stdin. Prints the id, or how many."""
    options: dict[str, Any] = {"key": key, "priority": priority, "delay": delay, "expires": expires}
    options["headers"] = bodies.headers(header)
    if body == "-":
        if id is not None:
            raise UsageError("--id is for one message; stdin may hold many")
        bodies.require_stdin("lines")
        require_files(call.url)
        _publish_lines(call, name, options)
        return
    value = bodies.argument(body)
    require_files(call.url)
    with SyncClient(call.url) as client:
        published = client.publish(name, value, id=id, **options)
    if call.json:
        print_json({"id": published})
    else:
        print(published)


def _publish_lines(call: Call, name: str, options: dict[str, Any]) -> None:
    with SyncClient(call.url) as client, progress(f"publishing to {name}", _stdin_size()) as advance:
        lines = _Lines(client, name, options, advance)
        try:
            lines.publish()
        except KeyboardInterrupt:
            note(f"interrupted: {lines.published} published for certain, up to line {lines.line}")
            raise
    if call.json:
        print_json({"published": lines.published})
    else:
        print(f"published {lines.published} to {name}")


class _Lines:
    """Publishes lines in order. Whatever goes wrong, the error says which line and how many are published."""

    def __init__(self, client: SyncClient, name: str, options: dict[str, Any], advance: Advance) -> None:
        self.published = 0
        self.line = 0
        """The last one dealt with."""
        self._client = client
        self._name = name
        self._options = options
        self._advance = advance
        self._bytes = 0

    def publish(self) -> None:
        """:raises PenstockError: a line that is not JSON, or that the broker does not take."""
        for lines in _read_lines():
            for at in range(0, len(lines), CHUNK):
                self._publish_chunk(lines[at : at + CHUNK])

    def _publish_chunk(self, lines: list[bytes]) -> None:
        values: list[Any] = []
        numbers: list[int] = []
        bad: PenstockError | None = None
        for number, line in enumerate(lines, self.line + 1):
            text = line.strip()
            if not text:
                continue
            try:
                values.append(bodies.parse(text))
            except (InvalidMessage, BodyTooLarge) as error:
                bad = self._stopped(number, len(values), error)
                break
            numbers.append(number)
        self._send(values, numbers)
        if bad is not None:
            raise bad
        self.line += len(lines)
        self._bytes += sum(map(len, lines)) + len(lines)
        self._advance(self._bytes, self.published)

    def _send(self, values: list[Any], numbers: list[int]) -> None:
        if not values:
            return
        try:
            self._client.publish_many(self._name, values, **self._options)
        except PublishError as error:
            if isinstance(error, PublishTimeout):
                raise PublishError(
                    f"lines {numbers[0]} to {numbers[-1]}: {error}; {self.published} published for certain"
                ) from error
            first = min(error.failed)
            gone = len(values) - len(error.failed)
            self.published += gone
            others = f" ({len(error.failed)} refused, {gone} published from lines {numbers[0]} to {numbers[-1]})"
            raise PublishError(
                f"line {numbers[first]}: {error.failed[first]}{others if gone else ''}; {self.published} published"
            ) from error
        self.published += len(values)

    def _stopped(self, number: int, before: int, why: PenstockError) -> PublishError:
        return PublishError(f"line {number}: {why}; {self.published + before} published, all from the lines before it")


def _read_lines() -> Iterator[list[bytes]]:
    """Whole lines as they come. One that is too long for a body comes in part, and is refused."""
    rest = b""
    while data := os.read(sys.stdin.fileno(), READ):
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > MAX_BODY + READ:
            lines.append(rest)
        if lines:
            yield lines
    if rest:
        yield [rest]


def _stdin_size() -> int | None:
    """Bytes left in stdin, where it is a file."""
    found = os.fstat(sys.stdin.fileno())
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_size - os.lseek(sys.stdin.fileno(), 0, os.SEEK_CUR)
