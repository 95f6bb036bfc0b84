"""What a task's function is called with: arguments read off its signature, out of a message's body."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import msgspec.inspect

from penstock import codec, terms
from penstock.delivery.arguments import name_of, resolve
from penstock.errors import DeclarationError, InvalidArguments, one_line
from penstock.message import Message
from penstock.terms import Reply

Parameter = inspect.Parameter
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


class Task:
    """The whole record of the task at hand, for a function with a parameter named `task` or annotated so.

    `taskid` is its id, `topic` the name it was sent to, `content` what was sent, `message` the message
    that carries it (None in a process of its own).
    """

    __slots__ = ("content", "message", "taskid", "topic")

    def __init__(self, taskid: str, topic: str, content: Any, message: Message | None = None) -> None:
        self.taskid = taskid
        self.topic = topic
        self.content = content
        self.message = message

    def model_dump(self, mode: str = "json") -> dict[str, Any]:
        """What can be told of it elsewhere."""
        return {"taskid": self.taskid, "topic": self.topic, "content": self.content}

    def __repr__(self) -> str:
        return f"<Task {self.taskid} on {self.topic!r}>"


class Bound(msgspec.Struct):
    """The arguments of one call, converted to what the function wants."""

    content: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Signature:
    """How a function takes what is sent to it.

    :raises DeclarationError: not a function, an annotation that does not resolve, or that no JSON can become.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise DeclarationError(f"{function!r} cannot be a task: it is not callable")
        self.name = name_of(function)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise DeclarationError(f"{self.name} cannot be a task: it is a generator")
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except ValueError as error:
            raise DeclarationError(f"{self.name} cannot be a task: {error}") from None
        kinds = {one.name: resolve(one.annotation, function, self.name) for one in parameters}
        whole = [
            one.name
            for one in parameters
            if one.kind not in _VARIADIC and (one.name == "task" or kinds[one.name] is Task)
        ]
        if len(whole) > 1:
            raise DeclarationError(f"{self.name}: only one parameter can be the task, not {', '.join(whole)}")
        self.task_parameter = whole[0] if whole else None
        positional = [one.name for one in parameters if one.kind in _POSITIONAL]
        self._task_at = positional.index(whole[0]) if whole and whole[0] in positional else None
        rest = [one for one in parameters if one.name not in whole]
        self._signature = inspect.Signature(rest, __validate_parameters__=False)
        self._names = [one.name for one in rest if one.kind in _POSITIONAL]
        self._fillable = [one.name for one in rest if one.kind not in _VARIADIC]
        self._variadic = {one.name for one in rest if one.kind in _VARIADIC}
        self._required = {one.name for one in rest if one.name in self._fillable and one.default is Parameter.empty}
        self._plain = len(self._names) == len(rest)
        converters = {one.name: _converter(kinds[one.name], f"{self.name}({one.name})") for one in rest}
        self._converters = {name: convert for name, convert in converters.items() if convert is not None}
        self._returned = _returned(function, self.name)

    def encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> msgspec.Raw:
        """The body of a message that asks for this call.

        :raises InvalidArguments: the function could not be called so.
        :raises Unencodable: an argument without a JSON form.
        """
        data, _ = codec.encode({"args": args, "kwargs": kwargs})
        self.bind(msgspec.json.decode(data), arguments=True)
        return msgspec.Raw(data)

    def decode(self, raw: bytes, headers: Mapping[str, Any], limit: int) -> Bound:
        """The arguments in a message's body.

        :raises InvalidMessage: it is not what it is declared to be.
        :raises InvalidArguments: the function cannot be called with it.
        """
        return self.bind(codec.decode(raw, headers, limit), terms.read(headers).arguments)

    def bind(self, content: Any, arguments: bool) -> Bound:
        """:raises InvalidArguments: the function cannot be called with it."""
        args, kwargs = self._spread(content, arguments)
        try:
            if self._plain and not kwargs and len(args) == len(self._names):
                if not self._converters:
                    return Bound(content, tuple(args), {})
                given = zip(self._names, args, strict=True)
                return Bound(content, tuple([self._convert(name, value) for name, value in given]), {})
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            if isinstance(error, InvalidArguments):
                raise
            raise InvalidArguments(f"{self.name}: {error}") from None
        for name, value in bound.arguments.items():
            if name not in self._variadic:
                bound.arguments[name] = self._convert(name, value)
        return Bound(content, bound.args, bound.kwargs)

    def with_task(self, bound: Bound, task: Task) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with the task among them, where the function wants it."""
        name, at = self.task_parameter, self._task_at
        if name is None:
            return bound.args, bound.kwargs
        if at is not None and at <= len(bound.args):
            return (*bound.args[:at], task, *bound.args[at:]), bound.kwargs
        return bound.args, {**bound.kwargs, name: task}

    def without_task(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any], Any]:
        """The reverse: the other arguments, and what stands where the task is wanted (None: nothing)."""
        name, at = self.task_parameter, self._task_at
        if name in kwargs:
            return list(args), {other: value for other, value in kwargs.items() if other != name}, kwargs[name]
        if at is not None and at < len(args):
            return [*args[:at], *args[at + 1 :]], kwargs, args[at]
        return list(args), kwargs, None

    def typed(self, value: Any) -> Any:
        """A result that has been JSON, as what the function is declared to return; as it came where it is not that."""
        if self._returned is None:
            return value
        try:
            return self._returned(value)
        except Exception:
            return value

    def _spread(self, content: Any, arguments: bool) -> tuple[list[Any], dict[str, Any]]:
        """Content that was sent as it is: the one argument, or, for a function of several, the keywords.

        The keys of keywords are parameters, all that need a value among them. Where several need one, any such
        dict is meant as keywords: as the one argument it would be too few.
        """
        if arguments:
            try:
                return list(content["args"]), dict(content["kwargs"])
            except (TypeError, KeyError, ValueError):
                raise InvalidArguments(f"{self.name}: the body does not say args and kwargs") from None
        if not self._fillable and not self._variadic and (content is None or self.task_parameter is not None):
            return [], {}
        if isinstance(content, dict) and self._are_keywords(content):
            return [], content
        return [content], {}

    def _are_keywords(self, content: dict[str, Any]) -> bool:
        if len(self._fillable) < 2 or not set(self._fillable).issuperset(content):
            return False
        return len(self._required) > 1 or (bool(content) and self._required.issubset(content))

    def _convert(self, name: str, value: Any) -> Any:
        convert = self._converters.get(name)
        if convert is None:
            return value
        try:
            return convert(value)
        except Exception as error:  # msgspec's, pydantic's, and whatever the type's own checks raise
            raise InvalidArguments(f"{self.name}: {name}: {one_line(error)}") from None


def _returned(function: Callable[..., Any], name: str) -> Callable[[Any], Any] | None:
    """From what JSON gives to what the function is annotated to return; None: to nothing that JSON can become."""
    try:
        kind = resolve(inspect.signature(function).return_annotation, function, name)
        return None if kind in (None, type(None), Reply) else _converter(kind, name)
    except DeclarationError:
        return None


def _converter(kind: Any, where: str) -> Callable[[Any], Any] | None:
    """From what JSON gives to what the annotation says; None: it says nothing."""
    if kind in (Parameter.empty, Any, object):
        return None
    validate = getattr(kind, "model_validate", None)
    if callable(validate):
        return validate  # type: ignore[no-any-return]
    try:
        if isinstance(msgspec.inspect.type_info(kind), msgspec.inspect.CustomType):
            raise TypeError("not a type that JSON can be validated against")
    except (TypeError, NameError) as error:
        raise DeclarationError(f"{where}: arguments cannot be decoded into {kind!r}: {one_line(error)}") from None

    def convert(value: Any) -> Any:
        return msgspec.convert(value, kind, dec_hook=_model)

    return convert


def _model(kind: type, value: Any) -> Any:
    validate = getattr(kind, "model_validate", None)
    if callable(validate):
        return validate(value)
    raise NotImplementedError(f"{kind!r} is not a type that JSON can be validated against")
