"""The description: whatever is asked within it, and beyond it, is answered as it says, and never with a 5xx."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_schema_conformance,
    status_code_conformance,
)

from penstock.web import access
from penstock.web.roles import PROBES, Role
from tests.web.conftest import TOKENS, started

pytestmark = pytest.mark.blocks

HEADERS = {"Authorization": f"Bearer {TOKENS[Role.EDIT]}"}
CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    ignored_auth,
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A node in a thread of its own, patient with wrong tokens."""
    folder = tmp_path_factory.mktemp("node")
    urls: list[str] = []
    up, over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with started(folder) as served:
            urls.append(served.url)
            up.set()
            while not over.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert up.wait(30)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(access, "FAILURES", 10**9)
            yield urls[0]
    finally:
        over.set()
        thread.join(30)


def test_each_operation_has_role_example_and_errors(url: str) -> None:
    described = httpx.get(f"{url}/openapi.json", headers=HEADERS, trust_env=False).json()
    assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            assert operation["security"] == ([] if path in PROBES else [{"token": []}]), path
            if path in PROBES:
                continue
            assert "Role: " in operation["description"]
            assert {"401", "403", "503"} <= set(operation["responses"])
            for status, answer in operation["responses"].items():
                if status != "204":
                    assert answer["content"]["application/json"]["example"] is not None, (method, path, status)


def test_whatever_is_asked_is_answered_as_described(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=HEADERS)
    count = 0
    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]
        _ask(operation.as_strategy())
        with contextlib.suppress(Unsatisfiable):  # without a parameter or body nothing can be wrong
            _ask(operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
        count += 1
    assert count > 20


def _ask(cases: SearchStrategy[Any]) -> None:
    @given(cases)
    @settings(max_examples=8, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        case.call_and_validate(headers=HEADERS, checks=CHECKS, timeout=20)

    ask()
