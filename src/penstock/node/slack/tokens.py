"""The tokens in the YAML of a job: masked where that is shown, and put back where it is written again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from penstock.node import configs
from penstock.node.definitions import SlackOption
from penstock.node.documents import InvalidDefinitions, compose, construct

KEYS = ("token", "app_token")
_COMMENTED = re.compile(r"(#[^\n]*?)\bx(?:ox[a-z]|app)-[\w-]+")


def masked(text: str) -> str:
    """A job's YAML without its tokens; one that only refers to the environment stays."""
    hidden = {key: configs.MASK for key, value in _tokens(text).items() if not configs.refers(value)}
    return _COMMENTED.sub(rf"\1{configs.MASK}", _replaced(text, hidden))


def unmasked(text: str, old: SlackOption | None) -> str | None:
    """The reverse: the tokens that there were before. None: there was none in such a place."""
    hidden = [key for key, value in _tokens(text).items() if value == configs.MASK]
    before = {key: getattr(old, key, None) for key in hidden}
    if None in before.values():
        return None
    return _replaced(text, before)


def _tokens(text: str) -> dict[str, Any]:
    slack = _values(text).get("slack")
    return {key: slack[key] for key in KEYS if key in slack} if isinstance(slack, Mapping) else {}


def _values(text: str) -> dict[str, Any]:
    node = compose("-", text.encode())
    values = None if node is None else construct("-", node)
    return values if isinstance(values, dict) else {}


def _replaced(text: str, tokens: Mapping[str, Any]) -> str:
    """The same YAML with other tokens: as it was written, or written anew where that says something else."""
    if not tokens:
        return text
    values = _values(text)
    meant = {**values, "slack": {**values["slack"], **tokens}}
    written = text
    for (start, end), token in sorted(_places(text, tokens), reverse=True):
        end = start + len(text[start:end].rstrip())  # that of a block is in the line after it
        written = written[:start] + json.dumps(token) + written[end:]
    try:
        if _values(written) == meant:
            return written
    except InvalidDefinitions:
        pass  # an alias of what was replaced
    return configs.text_of(meant)


def _places(text: str, tokens: Mapping[str, Any]) -> list[tuple[tuple[int, int], Any]]:
    """Where the tokens stand, as characters of the text."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)  # that in C may count in another way
    return [
        ((node.start_mark.index, node.end_mark.index), token)
        for slack in _members(root, "slack")
        for key, token in tokens.items()
        for node in _members(slack, key)
        if isinstance(node, yaml.ScalarNode)
    ]


def _members(node: yaml.Node | None, name: str) -> list[yaml.Node]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [value for key, value in pairs if isinstance(key, yaml.ScalarNode) and key.value == name]
