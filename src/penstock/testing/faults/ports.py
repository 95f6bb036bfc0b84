"""Ports for servers of our own."""

from __future__ import annotations

import random
import socket

# Outside of the range from which the system gives ports to connections: a client that keeps trying
# while the server is away could otherwise be given the server's port, and be connected to itself.
PORTS = (20_000, 30_000)


def free_ports(count: int) -> list[int]:
    """So many ports of the loopback that nobody listens on."""
    rng = random.Random()
    found: list[int] = []
    while len(found) < count:
        port = rng.randrange(*PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
