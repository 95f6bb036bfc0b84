"""`context`: what surrounds the running handler."""

from __future__ import annotations

import uuid
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from penstock.message import Message

if TYPE_CHECKING:
    from penstock.app import App


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


current_app: ContextVar[App] = ContextVar("penstock_app")
current_message: ContextVar[Message] = ContextVar("penstock_message")


class Context:
    """The running app, its settings and the message at hand. Each handler call sees its own."""

    @property
    def app(self) -> App:
        """:raises LookupError: outside a running app."""
        return current_app.get()

    @property
    def settings(self) -> Settings:
        """What `App(settings=…)` and `app.run(name=value)` were given.

        :raises LookupError: outside a running app.
        """
        return current_app.get().settings

    @property
    def message(self) -> Message:
        """The message being handled; of a batch, the first.

        :raises LookupError: outside a handler.
        """
        return current_message.get()


context = Context()
