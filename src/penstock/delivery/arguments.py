"""What a handler wants to be called with, read off its signature at declaration."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import msgspec

from penstock import codec
from penstock.errors import DeclarationError, one_line
from penstock.message import Message


class Shape(Enum):
    """The ways to call a handler."""

    BATCH = "list[Message]"
    MESSAGE = "Message"
    BODIES = "list of bodies"
    BODY = "body"


class Binding(msgspec.Struct, frozen=True):
    """How messages become the handler's one argument."""

    shape: Shape
    decode: codec.Decode

    def argument(self, messages: list[Message]) -> Any:
        if self.shape is Shape.BATCH:
            return messages
        if self.shape is Shape.MESSAGE:
            return messages[0]
        if self.shape is Shape.BODIES:
            return [message.body for message in messages]
        return messages[0].body


_SEQUENCES = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)


def bind(handler: Callable[..., Any]) -> Binding:
    """The binding of a handler.

    :raises DeclarationError: not callable, a generator, not exactly one argument to fill, an
        annotation that does not resolve or that bodies cannot be decoded into.
    """
    name = name_of(handler)
    if not callable(handler):
        raise DeclarationError(f"{handler!r} cannot be a handler: it is not callable")
    if inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        raise DeclarationError(f"{name} cannot be a handler: it is a generator")
    annotation = _annotation(handler, name)
    if annotation is inspect.Parameter.empty or annotation in _SEQUENCES:
        return Binding(Shape.BATCH, codec.decode)
    if annotation is Message:
        return Binding(Shape.MESSAGE, codec.decode)
    if annotation is Any or annotation is object:
        return Binding(Shape.BODY, codec.decode)
    if typing.get_origin(annotation) in _SEQUENCES:
        (item,) = typing.get_args(annotation)
        if item is Message:
            return Binding(Shape.BATCH, codec.decode)
        if item is Any or item is object:
            return Binding(Shape.BODIES, codec.decode)
        return Binding(Shape.BODIES, _typed(item, name))
    return Binding(Shape.BODY, _typed(annotation, name))


def bind_data(handler: Callable[..., Any]) -> codec.Decode:
    """How the one argument of a broadcast's handler is decoded.

    :raises DeclarationError: as `bind`.
    """
    name = name_of(handler)
    if not callable(handler):
        raise DeclarationError(f"{handler!r} cannot be a handler: it is not callable")
    annotation = _annotation(handler, name)
    untyped = annotation in (inspect.Parameter.empty, Any, object)
    return codec.decode if untyped else _typed(annotation, name)


def function_of(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind a partial, a bound method or an object that can be called."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if inspect.isfunction(handler) or inspect.ismethod(handler) or inspect.isbuiltin(handler):
        return handler
    call: Callable[..., Any] = getattr(type(handler), "__call__", handler)  # noqa: B004 - the method is wanted
    return call


def name_of(handler: Any) -> str:
    """A handler's name for people."""
    name = getattr(function_of(handler), "__qualname__", None) if callable(handler) else None
    return (name or repr(handler)).rpartition("<locals>.")[2]


def _typed(kind: Any, name: str) -> codec.Decode:
    try:
        return codec.typed(kind)
    except (TypeError, NameError) as error:
        raise DeclarationError(f"{name}: bodies cannot be decoded into {kind!r}: {one_line(error)}") from None


def _annotation(handler: Callable[..., Any], name: str) -> Any:
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except ValueError as error:
        raise DeclarationError(f"{name} cannot be a handler: {error}") from None
    fillable = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    others = [p for p in parameters if p not in fillable[:1] and p.default is p.empty]
    others = [p for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not fillable or others:
        raise DeclarationError(f"{name} must take one argument, the message or messages; it takes {_count(parameters)}")
    annotation = fillable[0].annotation
    return resolve(annotation, handler, name)


def _count(parameters: list[inspect.Parameter]) -> str:
    return f"({', '.join(str(parameter) for parameter in parameters)})" if parameters else "none"


def resolve(annotation: Any, handler: Callable[..., Any], name: str) -> Any:
    """An annotation, as it was meant where the handler was defined.

    :raises DeclarationError: it means nothing there.
    """
    return _resolve(annotation, handler, name) if isinstance(annotation, str) else annotation


def _resolve(annotation: str, handler: Callable[..., Any], name: str) -> Any:
    """A postponed annotation, seen from where the handler was defined: its module, then the calling functions."""
    scope: Mapping[str, Any] = getattr(inspect.unwrap(function_of(handler)), "__globals__", {})
    frame = sys._getframe(1)
    failure: Exception | None = None
    local: Mapping[str, Any] = {}
    while True:
        try:
            return eval(annotation, dict(scope), dict(local))  # noqa: S307 - the module's own source text
        except Exception as error:
            failure = failure or error
        if frame is None:
            raise DeclarationError(f"{name}: annotation {annotation!r} does not resolve: {one_line(failure)}")
        local, frame = frame.f_locals, frame.f_back  # type: ignore[assignment]
