"""What the documents show of the examples is in them, and whatever else they show is Python."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["docs/calls-from-web-apps.md"]
FROM = re.compile(r"# (examples/\S+\.py)\n")


def blocks(page: str) -> list[str]:
    """The Python in a document."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def parts(text: str) -> list[str]:
    """What stands between blank lines, whatever the indentation."""
    return [dedent(part).strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


def shows(source: str, part: str) -> bool:
    """Whether these lines stand in a file one after another, with an indentation or without."""
    lines, wanted = source.splitlines(), part.splitlines()
    windows = (lines[at : at + len(wanted)] for at in range(len(lines) - len(wanted) + 1))
    return any(dedent("\n".join(window)).splitlines() == wanted for window in windows)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_shown_of_an_example_is_in_it(page: str) -> None:
    shown = 0
    for block in blocks(page):
        found = FROM.match(block)
        if found is not None:
            source = (ROOT / found[1]).read_text()
            for part in parts(block[found.end() :]):
                assert shows(source, part), f"not in {found[1]}:\n{part}"
                shown += 1
    assert shown, f"{page} shows nothing of the examples"


@pytest.mark.parametrize("page", PAGES)
def test_whatever_else_is_shown_compiles(page: str) -> None:
    for block in blocks(page):
        if not FROM.match(block):
            compile(block, page, "exec")
