"""`Link`: a server, by whatever connection there is at the moment; and `Script`, what is carried out there whole."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import msgspec

from penstock.errors import BrokerRefused, BrokerUnavailable
from penstock.redis.address import Address
from penstock.redis.errors import Reply, translate
from penstock.redis.line import Line, Word, connect

OLDEST = (6, 2)
_DEFAULT_USER = "default"
_MOST_MOVES = 5  # redirections that one command follows
_MOST_NODES = 16  # of a cluster, that are remembered


class Script:
    """A Lua script; its first and only key is the prefix of all keys it touches."""

    def __init__(self, *parts: str) -> None:
        self.text = "\n".join(parts)
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


class Link:
    """Connects when it is first used, and again when the connection was lost. It belongs to one event loop at a
    time. Commands that are called together share a round trip."""

    def __init__(self, address: Address) -> None:
        self.address = address
        """Where our keys are: in a cluster it may be another node than the one that was named."""
        self.generation = 0
        """Grows with each connection: what the server was told on an earlier one it may have forgotten."""
        self._nodes = [address]
        """The one that was named, and those where our keys have been."""
        self._line: Line | None = None
        self._connecting: asyncio.Task[Line] | None = None
        self._closings = 0

    @property
    def up(self) -> bool:
        return self._line is not None and self._line.up

    async def line(self) -> Line:
        """:raises BrokerUnavailable: not reachable now.
        :raises BrokerRefused: never going to work.
        """
        line = self._line
        if line is not None and line.up:
            return line
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect(), name="penstock-redis-connect")
            self._connecting.add_done_callback(self._connected)
        connecting, task = self._connecting, asyncio.current_task()
        try:
            return await asyncio.shield(connecting)  # others may be waiting for it too
        except asyncio.CancelledError:
            if connecting.cancelled() and not (task and task.cancelling()):
                raise BrokerUnavailable("the connection is closed") from None
            raise

    async def call(self, *command: Word) -> Any:
        """:raises BrokerError: what the server says, in our words."""
        return await self._carry_out(command)

    async def run(self, script: Script, key: str, *arguments: Word) -> Any:
        """:raises BrokerError: what the server says, in our words; `BrokerUnavailable`: it may have been done."""
        closings = self._closings
        try:
            return await self._carry_out(("EVALSHA", script.sha, 1, key, *arguments), "NOSCRIPT")
        except Reply:  # another server, or one that was restarted
            if self._closings != closings:
                raise BrokerUnavailable("the connection is closed") from None
            return await self._carry_out(("EVAL", script.text, 1, key, *arguments))

    async def _carry_out(self, command: tuple[Word, ...], expected: str = "") -> Any:
        """:raises Reply: an error of the code `expected`."""
        closings = self._closings
        for _ in range(_MOST_MOVES):
            if self._closings != closings:
                raise BrokerUnavailable("the connection is closed")
            line = self._line
            if line is None or not line.up:
                line = await self.line()
            try:
                return await line.send(command)
            except Reply as reply:
                if reply.code == expected:
                    raise
                refusal = translate(reply, self.address.name)
                if reply.code == "MOVED":
                    self._follow(str(reply), line)
                elif reply.code == "READONLY":
                    line.abort("was a primary")  # its name may stand for another server by now
                    raise refusal from None
                else:
                    raise refusal from None
        raise refusal

    def close(self) -> None:
        """Idempotent; it may be used again, but not by calls that are under way."""
        self._closings += 1
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def shun(self, address: Address) -> None:
        """A node that did not serve us: try another one that we know next."""
        if self.address == address:
            self.address = self._nodes[(self._nodes.index(address) + 1) % len(self._nodes)]

    def doubt(self, seconds: float) -> None:
        """Give the connection up if the server has been silent for so long, with something to answer."""
        if self._line is not None and self._line.silent >= seconds:
            self._line.abort(f"has not answered for {seconds:g} s")

    def _connected(self, connecting: asyncio.Task[Line]) -> None:
        line = None if connecting.cancelled() or connecting.exception() else connecting.result()
        if self._connecting is connecting:
            self._connecting = None
            if line is not None:
                self._line = line
                self.generation += 1
        elif line is not None:
            line.close()  # it was closed while it connected

    async def _connect(self) -> Line:
        address = self.address
        try:
            line = await connect(address)
            try:
                await greet(line, address)
            except BaseException:
                line.close()
                raise
        except BrokerUnavailable:
            self.shun(address)
            raise
        return line

    def _follow(self, moved: str, line: Line) -> None:
        """In a cluster: our keys are on another node."""
        host, _, port = moved.split()[2].rpartition(":")
        self.address = msgspec.structs.replace(self.address, host=host or self.address.host, port=int(port))
        if self.address not in self._nodes:
            self._nodes = [self._nodes[0], *self._nodes[1:][2 - _MOST_NODES :], self.address]
        line.abort("has handed its keys to another node")


async def greet(line: Line, address: Address) -> dict[str, Any]:
    """Say who we are and which database we mean; what the server says of itself.

    :raises BrokerRefused: it does not want us, or is too old.
    :raises BrokerUnavailable: it cannot serve us now.
    """
    account: tuple[str, ...] = ()
    if address.password is not None or address.user is not None:
        account = ("AUTH", address.user or _DEFAULT_USER, address.password or "")
    greeting = line.send(("HELLO", 2, *account, "SETNAME", "penstock"))
    selecting = line.send(("SELECT", address.database)) if address.database else None
    try:
        answer = await greeting
        if selecting is not None:
            await selecting
    except Reply as reply:
        refusal = translate(reply, address.name)
        raise refusal if isinstance(refusal, BrokerUnavailable) else BrokerRefused(str(refusal)) from None
    finally:
        if selecting is not None and selecting.done() and not selecting.cancelled():
            selecting.exception()  # fetched, or both were refused for the same reason
    said = {key.decode(): value for key, value in zip(answer[::2], answer[1::2], strict=True)}
    _check(said, address.name)
    return said


def _check(said: dict[str, Any], where: str) -> None:
    version = said.get("version", b"").decode()
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        raise BrokerRefused(f"Redis at {where} is too old: {version}, and 6.2 or newer is needed")
    # In a cluster a replica says where the primary of our keys is.
    if said.get("mode") != b"cluster" and said.get("role") not in (b"master", b"primary"):
        raise BrokerUnavailable(f"Redis at {where} is a read-only replica: give the address of its primary")
