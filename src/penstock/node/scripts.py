"""Scripts: the Python in a definition, compiled so that errors name the line of its YAML file."""

from __future__ import annotations

import ast
import threading
import warnings
from collections.abc import Mapping
from types import CodeType
from typing import NamedTuple

from penstock.errors import printable

JOB = "job"
"""The name of the coroutine function that a job's script becomes."""
FORBIDDEN: Mapping[type[ast.AST], str] = {
    ast.Import: "import",
    ast.ImportFrom: "import",
    ast.For: "for",
    ast.AsyncFor: "for",
    ast.While: "while",
}
"""Statements that code which is injected may not hold."""
one_at_a_time = threading.Lock()
MAX_DEPTH_ERROR = "it is nested too deep for Python"


class Script(NamedTuple):
    """Some Python, and where it stands."""

    text: str
    file: str
    first_line: int


class ScriptError(Exception):
    """What is wrong with a script, and in which line of its file."""

    def __init__(self, line: int, text: str) -> None:
        self.line = line
        super().__init__(text)


def compile_worker(script: Script, name: str) -> tuple[CodeType, str]:
    """The module that defines a worker's function, and that function's name: its only one, or that of the worker.

    :raises ScriptError: not Python; no function, or several.
    """
    tree = _parse(script)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    named = [one for one in functions if one.name == name]
    chosen = functions if len(functions) == 1 else named[-1:]
    if not functions:
        raise ScriptError(script.first_line, "the script defines no function")
    if not chosen:
        what = ", ".join(one.name for one in functions)
        raise ScriptError(functions[1].lineno, f"the script defines {what}: one of them must be named {name!r}")
    (function,) = chosen
    if missing := _wanted(function):
        raise ScriptError(function.lineno, f"{function.name} is called without arguments, and wants {missing}")
    if _yields(function):
        raise ScriptError(function.lineno, f"{function.name} is a generator: nobody would take what it yields")
    return _compile(tree, script), function.name


def compile_function(script: Script, name: str) -> CodeType:
    """The module that defines a function.

    :raises ScriptError: not Python; none of that name.
    """
    tree = _parse(script)
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    if name not in defined:
        what = f"it defines {', '.join(defined)}" if defined else "it defines none"
        raise ScriptError(script.first_line, f"the code must define the function {name!r}: {what}")
    return _compile(tree, script)


def compile_job(script: Script, name: str) -> CodeType:
    """A module that defines the coroutine function `JOB`, of one parameter `task`, whose body is the script; where
    a frame is named, it has the job's name.

    :raises ScriptError: not Python.
    """
    module = _as_job(_parse(script), script)
    (function,) = (one for one in module.co_consts if isinstance(one, CodeType))
    named = function.replace(co_name=name, co_qualname=name)
    return module.replace(co_consts=tuple(named if one is function else one for one in module.co_consts))


def compile_injected(script: Script) -> CodeType:
    """The same of what somebody wrote to a job that runs it.

    :raises ScriptError: not Python; a statement that is not for that.
    """
    tree = _parse(script)
    for node in ast.walk(tree):
        if (word := FORBIDDEN.get(type(node))) is not None:
            raise ScriptError(getattr(node, "lineno", script.first_line), f"`{word}` is not allowed here")
    return _as_job(tree, script)


def _as_job(tree: ast.Module, script: Script) -> CodeType:
    if not tree.body:
        raise ScriptError(script.first_line, "the script is empty")
    around = parse(f"async def {JOB}(task): pass")
    function = around.body[0]
    assert isinstance(function, ast.AsyncFunctionDef)
    ast.increment_lineno(around, script.first_line - 1)
    function.body = tree.body
    return _compile(around, script)


def parse(text: str, file: str = "<script>") -> ast.Module:
    """The tree of a script. From whatever thread: CPython 3.11 counts the depth of all that are under way together.

    :raises SyntaxError, ValueError, RecursionError, MemoryError: it has none.
    """
    with one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a doubtful escape in it is not ours to judge
        flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree: ast.Module = compile(text, file, "exec", flags, dont_inherit=True)
        return tree


def _parse(script: Script) -> ast.Module:
    try:
        tree = parse(script.text, script.file)
    except SyntaxError as error:
        raise _syntax(error, script, script.first_line - 1) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ScriptError(script.first_line, f"not Python: {printable(str(error)) or MAX_DEPTH_ERROR}") from None
    ast.increment_lineno(tree, script.first_line - 1)
    return tree


def _compile(tree: ast.Module, script: Script) -> CodeType:
    with one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return compile(tree, script.file, "exec", dont_inherit=True)
        except SyntaxError as error:  # `return` outside of a function, say: its line is the file's already
            raise _syntax(error, script, 0) from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise ScriptError(script.first_line, f"not Python: {printable(str(error)) or MAX_DEPTH_ERROR}") from None


def _syntax(error: SyntaxError, script: Script, offset: int) -> ScriptError:
    line = script.first_line if error.lineno is None else error.lineno + offset
    return ScriptError(line, f"not Python: {printable(error.msg)}")


def _wanted(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The parameters that must be given."""
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    needed = positional[: len(positional) - len(args.defaults)]
    needed += [one for one, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None]
    return ", ".join(one.arg for one in needed)


def _yields(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, inner):
            waiting += ast.iter_child_nodes(node)
    return False
