"""The systems that the faults happen to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.testing.faults import NatsNode, PostgresNode, RabbitNode, RedisNode
from tests.faults.scenes import NatsScene, PostgresScene, RabbitScene, RedisScene, Scene, Served, SqliteScene
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


@pytest.fixture(scope="session")
def shared_redis_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisNode]:
    require("redis")
    with RedisNode(tmp_path_factory.mktemp("redis")) as node:
        yield node


@pytest.fixture(scope="session")
def shared_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsNode]:
    require("nats")
    with NatsNode(tmp_path_factory.mktemp("nats")) as node:
        yield node


@pytest.fixture
def postgres(postgres_url: str, tmp_path: Path) -> Iterator[PostgresScene]:
    """A schema of the server that tests share."""
    scene = PostgresScene(tmp_path, postgres_url)
    yield scene
    scene.close()


@pytest.fixture(scope="session")
def shared_postgres_node() -> Iterator[PostgresNode]:
    require("postgresql")
    with PostgresNode() as node:
        yield node


@pytest.fixture
def redis_node(shared_redis_node: RedisNode) -> RedisNode:
    """A server of our own, running, whatever the test before did to it."""
    shared_redis_node.resume()
    shared_redis_node.start()
    return shared_redis_node


@pytest.fixture
def redis(redis_node: RedisNode, tmp_path: Path) -> Iterator[RedisScene]:
    """A namespace of our server."""
    scene = RedisScene(tmp_path, redis_node, f"test-{next(_numbers)}")
    yield scene
    redis_node.resume()
    redis_node.start()
    scene.close()


@pytest.fixture
def postgres_node(shared_postgres_node: PostgresNode) -> PostgresNode:
    """A server of our own, running, whatever the test before did to it."""
    shared_postgres_node.resume()
    shared_postgres_node.start()
    return shared_postgres_node


@pytest.fixture
def elephant(postgres_node: PostgresNode, tmp_path: Path) -> Iterator[PostgresScene]:
    """A schema of our server."""
    scene = PostgresScene(tmp_path, postgres_node.url(f"test_{next(_numbers)}"))
    yield scene
    postgres_node.resume()
    postgres_node.start()
    scene.close()


@pytest.fixture
def nats_node(shared_nats: NatsNode) -> NatsNode:
    """A NATS server of our own, running, whatever the test before did to it."""
    shared_nats.resume()
    shared_nats.start()
    return shared_nats


@pytest.fixture
def mesh(nats_node: NatsNode, tmp_path: Path) -> Iterator[NatsScene]:
    """A space on our NATS server."""
    scene = NatsScene(tmp_path, nats_node, f"test-{next(_numbers)}")
    yield scene
    nats_node.resume()
    nats_node.start()
    scene.close()


@pytest.fixture(params=["lite", "postgres", "rabbit", "redis", "mesh"])
def scene(request: pytest.FixtureRequest) -> Scene:
    """Each system."""
    made: Scene = request.getfixturevalue(request.param)
    return made


@pytest.fixture(params=["rabbit", "redis"])
def served(request: pytest.FixtureRequest) -> Served:
    """Each system that is a server."""
    made: Served = request.getfixturevalue(request.param)
    return made
