"""`Site`: what the routes of a node's HTTP share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from starlette.requests import HTTPConnection

from penstock.control.audit import Audit
from penstock.control.metrics import Metrics, Sampler
from penstock.web.access import Access, Caller
from penstock.web.desk import Desk

CALLER = "penstock.caller"
"""Where the gate leaves the `Caller` in a request's scope."""


class Site:
    """A node behind HTTP, which is served before it has started and until it has ended."""

    def __init__(self, desk: Desk, access: Access, cookie: str, max_body: int) -> None:
        self.any_desk = desk
        """Also before it has started."""
        self.tokens: frozenset[str] = frozenset()
        """Which nobody is shown."""
        self.access = access
        self.cookie = cookie
        """The name of the session's: another one for each port, since browsers do not tell ports apart."""
        self.max_body = max_body
        """Bytes of a request's body."""
        self.masking = asyncio.Lock()
        """Held while an answer is masked."""
        self.counts: Callable[[], Mapping[str, int]] = dict
        self._audit: Audit | None = None
        self._metrics: Metrics | None = None

    @property
    def hidden(self) -> list[str]:
        """Text that nobody is shown, the longest first: one may be a part of another."""
        return sorted({*self.tokens, *self.any_desk.secrets}, key=len, reverse=True)

    @property
    def desk(self) -> Desk:
        """:raises BrokerUnavailable: the node has not started yet."""
        _ = self.any_desk.store
        return self.any_desk

    @property
    def audit(self) -> Audit:
        """:raises BrokerUnavailable: the node has not started yet."""
        if self._audit is None:
            self._audit = Audit(self.any_desk.store)
        return self._audit

    @property
    def metrics(self) -> Metrics:
        """:raises BrokerUnavailable: the node has not started yet."""
        if self._metrics is None:
            desk = self.desk
            sampler = Sampler(
                desk.name, desk.broker, lambda: queues_of(desk), lambda: {**self.counts(), **_settled(desk)}
            )
            self._metrics = Metrics(desk.store, sampler)
        return self._metrics


def site_of(request: HTTPConnection) -> Site:
    site: Site = request.app.state.site
    return site


def caller_of(scope: Mapping[str, object]) -> Caller:
    """Who makes an admitted request."""
    caller = scope[CALLER]
    assert isinstance(caller, Caller)
    return caller


def _settled(desk: Desk) -> dict[str, int]:
    life = desk.app._life
    return {} if life is None else {"messages_settled": life.settled}


def queues_of(desk: Desk) -> list[str]:
    """The queues that this node consumes."""
    return sorted({name for route in desk.app.routes for name in route.queues})
