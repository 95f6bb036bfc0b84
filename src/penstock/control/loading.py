"""Finding the app that `module:app` names."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from penstock.app import App
from penstock.context import importing
from penstock.errors import ConfigError, near, one_line

DEFAULT_ATTRIBUTE = "app"


STORE = "PENSTOCK_STORE"


def load(target: str, store: str | None = None) -> App:
    """The app of `module:attribute`; without an attribute, `app`. The current directory is importable.

    `store` is this process's `$PENSTOCK_STORE` from now on: what needs a store says so as it is declared.

    :raises ConfigError: no such module or attribute, not an App, a module that fails as it is imported
        (its error is the cause).
    """
    name, _, attribute = target.partition(":")
    attribute = attribute or DEFAULT_ATTRIBUTE
    if not name or name.endswith(".py") or "/" in name:
        module = name.removesuffix(".py").strip("./").replace("/", ".") or "module"
        raise ConfigError(f"{target!r} does not name an app: write {module}:{attribute}")
    if store is not None:
        os.environ[STORE] = store
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    module_found = _import(name, here)
    found: Any = module_found
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ConfigError(f"{name} has no {attribute!r}{_instead(module_found, attribute)}") from None
    if not isinstance(found, App):
        raise ConfigError(f"{name}:{attribute} is {_kind(found)}, not an App{_instead(module_found, attribute)}")
    return found


def _import(name: str, here: str) -> ModuleType:
    before = importing.set(True)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise ConfigError(f"there is no module {missing!r} here{near(missing, _modules(here))}") from None
        raise ConfigError(f"cannot import {name}: {_place(error, here)}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"cannot import {name}: {_place(error, here)}") from error
    finally:
        importing.reset(before)


def _place(error: BaseException, here: str) -> str:
    """`file:line: Type: message`, of the last line of the user's own files."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_relative(error.filename, here)}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and f"{os.sep}site-packages{os.sep}" not in frame.filename
    ]
    own = [frame for frame in frames if _relative(frame.filename, here) != frame.filename]
    for frame in reversed(own or frames):
        return f"{_relative(frame.filename, here)}:{frame.lineno}: {one_line(error)}"
    return one_line(error)


def _relative(path: str, here: str) -> str:
    return os.path.relpath(path, here) if path.startswith(here + os.sep) else path


def _modules(here: str) -> list[str]:
    """The modules and packages of a directory."""
    names = os.listdir(here)
    packages = [name for name in names if os.path.isfile(os.path.join(here, name, "__init__.py"))]
    return packages + [name.removesuffix(".py") for name in names if name.endswith(".py")]


def _instead(module: ModuleType, attribute: str) -> str:
    apps = [name for name, value in vars(module).items() if isinstance(value, App)]
    return near(attribute, apps) or (f" (did you mean {apps[0]!r}?)" if apps else "")


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return "a class"
    return "a function" if callable(value) else f"of type {type(value).__name__}"
