"""Wake-ups between processes: a datagram to the loopback port that a consuming process listens on.

It says which queues have something new, and is only ever a hint: a forged or lost one costs a look
at the file, or the second until the next regular look.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import zlib
from collections.abc import Callable, Iterable

import msgspec

LOOPBACK = "127.0.0.1"
MAX_SIZE = 1400

_BUCKETS = 1 << 16
_FIRST_BUCKET = -(1 << 20)  # below all ids that are reserved
_MOST_NAMED = 80  # buckets in a datagram, so that it stays small

_decode = msgspec.json.Decoder(set[int]).decode


def bucket(key: str) -> int:
    """The id, common to all processes, by which a datagram names an entry; few share one."""
    return _FIRST_BUCKET - zlib.crc32(key.encode()) % _BUCKETS


def buckets(keys: Iterable[str]) -> set[int]:
    """Those of some keys; none where they would be too many: then any entry may be meant."""
    found: set[int] = set()
    for key in keys:
        found.add(bucket(key))
        if len(found) > _MOST_NAMED:
            return set()
    return found


def named_buckets(ids: set[int]) -> set[int]:
    """The buckets among what a datagram says."""
    return {id for id in ids if id <= _FIRST_BUCKET}


class WakeUp:
    """This process's port. It exists from the first consumer on."""

    def __init__(self, heard: Callable[[set[int] | None], None]) -> None:
        self.port = 0
        self._heard = heard
        self._socket: socket.socket | None = None
        self._sender: socket.socket | None = None
        self._closed = False

    def listen(self) -> None:
        """Idempotent. Without a loopback interface there is only the regular look."""
        if self._socket is not None:
            return
        try:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.bind((LOOPBACK, 0))
        except OSError:
            return
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, args=(self._socket,), name="penstock-wake-up", daemon=True).start()

    def send(self, ports: Iterable[int], queue_ids: set[int]) -> None:
        """Tell the processes behind `ports`. Never blocks, never fails."""
        datagram = msgspec.json.encode(queue_ids)
        if len(datagram) > MAX_SIZE:
            datagram = b"[]"
        for port in ports:
            with contextlib.suppress(OSError):  # no file descriptor is left, say
                if self._sender is None:
                    self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    self._sender.setblocking(False)
                self._sender.sendto(datagram, (LOOPBACK, port))

    def forked(self) -> None:
        """In the child of a fork: nobody listens here."""
        for inherited in (self._socket, self._sender):
            if inherited is not None:
                inherited.close()

    def close(self) -> None:
        self._closed = True
        if self._socket is not None:
            if self.port:
                self.send([self.port], set())  # the listening thread closes its socket
            else:
                self._socket.close()
        if self._sender is not None:
            self._sender.close()

    def _serve(self, listening: socket.socket) -> None:
        with listening:
            while not self._closed:
                try:
                    datagram = listening.recv(MAX_SIZE)
                except OSError:
                    return
                try:
                    queue_ids = _decode(datagram)
                except msgspec.DecodeError:
                    continue
                self._heard(queue_ids or None)
