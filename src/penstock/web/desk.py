"""`Desk`: what HTTP needs of a node."""

from __future__ import annotations

from typing import Any, Protocol

from penstock.app import App
from penstock.brokers.base import Broker
from penstock.control.cluster import Cluster
from penstock.node.book import Book
from penstock.node.console import Console
from penstock.stores.base import Store
from penstock.stores.ledger import Ledger


class Desk(Protocol):
    """A started node, as `penstock.node.node.Node` is one."""

    app: App
    url: str | None
    """Where it is served; written here."""
    own_url: str | None
    """Where it reaches itself; written here."""
    token: str | None
    """With which its own scripts may do everything; written here."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def cluster(self) -> Cluster: ...
    @property
    def book(self) -> Book: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def store(self) -> Store: ...
    @property
    def console(self) -> Console | None:
        """None: it is off."""
        ...

    @property
    def secrets(self) -> set[str]:
        """Text that is not to be shown."""
        ...

    @property
    def ready(self) -> bool:
        """Connected and consuming."""
        ...

    @property
    def lag(self) -> float:
        """Seconds since the event loop last turned."""
        ...

    async def broker(self) -> Broker:
        """:raises BrokerUnavailable: it is away."""
        ...

    async def caught_up(self) -> None:
        """Until what the book says now is hosted here, or could not be; not for long."""
        ...

    async def send(self, topic: str, content: dict[str, Any], expire: float | None = 10.0) -> str:
        """:raises TypeError: content that is no mapping.
        :raises QueueFull: too much waits already.
        """
        ...
