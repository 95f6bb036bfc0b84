"""`context`: what surrounds the running handler."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from penstock.message import Message

if TYPE_CHECKING:
    from penstock.app import App


T = TypeVar("T")


class Settings(dict[str, Any]):
    """An app's settings, by attribute or by key, shared by all handlers of the process and not locked.

    `settings.uuid` is unique to the process.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.setdefault("uuid", uuid.uuid4().hex)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no setting {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


importing: ContextVar[bool] = ContextVar("penstock_importing", default=False)
"""The module of an app is being imported for what it declares: `app.run()` in it would be a mistake."""

current_app: ContextVar[App] = ContextVar("penstock_app")
current_message: ContextVar[Message] = ContextVar("penstock_message")
current_headers: ContextVar[dict[str, Any]] = ContextVar("penstock_headers")
current_progress: ContextVar[Callable[[float, float], None]] = ContextVar("penstock_progress")


class Context:
    """The running app, its settings and the message at hand. Each handler call sees its own."""

    @property
    def app(self) -> App:
        """:raises LookupError: outside a running app."""
        return _found(current_app, "context.app: no app is running here")

    @property
    def settings(self) -> Settings:
        """What `App(settings=…)` and `app.run(name=value)` were given.

        :raises LookupError: outside a running app.
        """
        return _found(current_app, "context.settings: no app is running here").settings

    @property
    def message(self) -> Message:
        """The message being handled; of a batch, the first.

        :raises LookupError: outside a handler.
        """
        return _found(current_message, "context.message: no message is being handled here")

    @property
    def headers(self) -> dict[str, Any]:
        """The headers of the reply that is being made; empty at the beginning of each.

        :raises LookupError: outside a task.
        """
        return _found(current_headers, "context.headers: no task is running here")

    def progress(self, done: float, total: float) -> None:
        """Say how far the running task is; who looks at its record sees it. Costs next to nothing, however often.

        Outside a task it does nothing, so that a task can be called as the function it is.

        :raises StoreRequired: there is nothing to remember it.
        :raises TypeError, ValueError: not two finite numbers.
        """
        tell = current_progress.get(None)
        if tell is None:
            return
        done, total = float(done), float(total)
        if not (math.isfinite(done) and math.isfinite(total)):
            raise ValueError(f"progress is told in finite numbers, not {done} of {total}")
        tell(done, total)


def _found(variable: ContextVar[T], otherwise: str) -> T:
    """:raises LookupError: it has no value here."""
    try:
        return variable.get()
    except LookupError:
        raise LookupError(otherwise) from None


context = Context()
