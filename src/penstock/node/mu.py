"""`MU`: dictionaries and lists whose members are attributes too, however deep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import yaml


class MU(dict[str, Any]):
    """A dict whose keys are attributes too, all the way down. `MU([…])` is a list of them.

    What is put in later is converted as well. A key that hides behind a method of `dict`, `items` say, is
    reached by `mu["items"]`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is MU and args and not isinstance(args[0], Mapping) and not _pairs(args[0]):
            return mu(args[0])
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.update(*args, **kwargs)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, mu(value))

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r}: there are {', '.join(map(repr, self)) or 'no keys'}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r}") from None

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __or__(self, other: Mapping[str, Any]) -> MU:  # type: ignore[override]
        return MU({**self, **other})

    def __ior__(self, other: Any) -> MU:  # type: ignore[override,misc]
        self.update(other)
        return self

    def copy(self) -> MU:
        return MU(self)

    def __repr__(self) -> str:
        return f"MU({super().__repr__()})"

    def __reduce__(self) -> tuple[type[MU], tuple[dict[str, Any]]]:
        return MU, (dict(self),)

    @property
    def yaml_format(self) -> str:
        """It as YAML, keys in order."""
        return yaml_text(self)

    @property
    def json_format(self) -> str:
        """It as indented JSON."""
        return json_text(self)


class MUList(list[Any]):
    """A list whose members are converted, of whatever depth."""

    def __init__(self, members: Iterable[Any] = ()) -> None:
        super().__init__(mu(member) for member in members)

    def append(self, member: Any) -> None:
        super().append(mu(member))

    def extend(self, members: Iterable[Any]) -> None:
        super().extend(mu(member) for member in members)

    def insert(self, index: Any, member: Any) -> None:
        super().insert(index, mu(member))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, MUList(value) if isinstance(index, slice) else mu(value))

    def __iadd__(self, members: Iterable[Any]) -> MUList:  # type: ignore[misc]
        self.extend(members)
        return self

    @property
    def yaml_format(self) -> str:
        """It as YAML."""
        return yaml_text(self)

    @property
    def json_format(self) -> str:
        """It as indented JSON."""
        return json_text(self)


def mu(value: Any) -> Any:
    """A value with its dictionaries and lists converted; anything else as it is."""
    if isinstance(value, MU | MUList):
        return value
    if isinstance(value, Mapping):
        return MU(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return MUList(value)
    return value


def plain(value: Any) -> Any:
    """The reverse: dict and list of Python's own."""
    if isinstance(value, Mapping):
        return {key: plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    return value


def yaml_text(value: Any) -> str:
    return yaml.safe_dump(msgspec.to_builtins(plain(value)), default_flow_style=False, allow_unicode=True)


def json_text(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(plain(value)), indent=4).decode()


def _pairs(value: Any) -> bool:
    """Whether `dict` takes it as its items."""
    return isinstance(value, zip) or (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) for one in value)
    )
