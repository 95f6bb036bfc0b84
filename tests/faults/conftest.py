"""The systems that the faults happen to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.testing.faults import RabbitNode
from tests.faults.scenes import RabbitScene, Scene, SqliteScene
from tests.servers import require

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitNode]:
    require("rabbitmq")
    with RabbitNode(tmp_path_factory.mktemp("rabbitmq")) as node:
        yield node


@pytest.fixture
def node(shared_node: RabbitNode) -> RabbitNode:
    """A server of our own, running, whatever the test before did to it."""
    shared_node.resume()
    shared_node.start()
    return shared_node


@pytest.fixture
def rabbit(node: RabbitNode, tmp_path: Path) -> Iterator[RabbitScene]:
    """A namespace of our server."""
    scene = RabbitScene(tmp_path, node, f"test-{next(_numbers)}")
    yield scene
    node.resume()
    node.start()
    scene.close()


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[SqliteScene]:
    scene = SqliteScene(tmp_path)
    yield scene
    scene.close()


@pytest.fixture(params=["lite", "rabbit"])
def scene(request: pytest.FixtureRequest) -> Scene:
    """Each system."""
    made: Scene = request.getfixturevalue(request.param)
    return made
