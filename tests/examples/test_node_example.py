"""`examples/node`, hosted by `penstock serve`, does what its README says."""

from __future__ import annotations

import configparser
import json
import pkgutil
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock import App, SyncClient
from penstock.node.debug import CHANNEL
from penstock.node.definitions import read_text
from penstock.node.folder import Folder, missing_modules
from penstock.web.probes import LATE
from penstock.web.server import GRACE, LAST_WAIT
from tests.examples.outside import Outside, environment, free_port, kafka, outside, sqs
from tests.helpers import eventually_sync

EXAMPLE = Path(__file__).parents[2] / "examples" / "node"
TOKEN = "t" * 40
PROJECT = "handson-project"
START = 45.0  # seconds; drivers are large, and each is imported by the script that needs it
OPTIONS = ("--worker-watch-interval", "0.2")
WORKERS = ("CloudPubSubConsumer", "SQSConsumer", "consumer", "grpc", "producer", "reaper", "websocket")


class Hosted:
    """A node with a copy of the example, and what its scripts show on the debug channel."""

    def __init__(self, folder: Path, **told: str) -> None:
        shutil.copytree(EXAMPLE, folder)
        self.folder = folder
        self.shown: list[str] = []
        self._log = folder.with_suffix(".log")
        port = free_port()
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=20, headers={"Authorization": f"Bearer {TOKEN}"}
        )
        self._heard = SyncClient(f"sqlite:///{folder / 'penstock.db'}")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock", "serve", str(folder), "--port", str(port), *OPTIONS],
                env=environment(PENSTOCK_TOKEN=TOKEN, PYTHONUNBUFFERED="1", **told),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._heard.subscribe(CHANNEL, lambda said: self.shown.append(said["text"]))
        self.until(self._is_ready, "the node is ready")

    @property
    def log(self) -> str:
        return self._log.read_text()

    def until(self, condition: Any, what: str) -> Any:
        def look() -> Any:
            assert self.process.poll() is None, self.log
            return condition()

        return eventually_sync(look, f"{what}\n{self.shown}\n{self._log}", within=START)

    def until_shown(self, text: str) -> str:
        return str(self.until(lambda: next((one for one in self.shown if text in one), None), f"{text!r} is shown"))

    def send(self, topic: str, /, **content: Any) -> str:
        answer = self.http.post("/tasks", json={"topic": topic, "content": content, "expire": 30})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["taskid"])

    def record(self, taskid: str) -> Any:
        """Of a task, once it has ended."""

        def look() -> Any:
            found = self.http.get(f"/tasks/{taskid}").raise_for_status().json()
            return found if found["completedAt"] else None

        return self.until(look, f"{taskid} ends")

    def worker(self, name: str) -> Any:
        """As it stands on this node."""
        return self.http.get(f"/workers/{name}").raise_for_status().json()["nodes"][0]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)

    def close(self) -> None:
        self._heard.close()
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def around() -> Iterator[Outside]:
    with outside() as servers:
        yield servers


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, around: Outside) -> Iterator[Hosted]:
    """With every server there is."""
    folder = tmp_path_factory.mktemp("example")
    with ExitStack() as stack:
        hosted = Hosted(
            folder / "node",
            KAFKA=stack.enter_context(kafka()),
            SQS_ENDPOINT_URL=stack.enter_context(sqs(folder)),
            SQS_QUEUE="handson",
            AWS_ACCESS_KEY_ID="nobody",
            AWS_SECRET_ACCESS_KEY="nothing",
            PUBSUB_EMULATOR_HOST=around.http,
            GCP_PROJECT_ID=PROJECT,
            GRPC_ADDRESS=around.grpc,
            WEBSOCKET_URL=f"ws://{around.http}/feed",
        )
        stack.callback(hosted.close)
        yield hosted


# -- the directory


def test_all_of_it_is_sound_and_its_requirements_are_what_it_imports() -> None:
    found = Folder(EXAMPLE).read()
    assert missing_modules(found) == []
    required = {re.split("[<>=]", line)[0] for line in (EXAMPLE / "requirements.txt").read_text().split()}
    assert required == {"aiobotocore", "aiohttp", "aiokafka", "gcloud-aio-pubsub", "grpcio"}
    assert sorted(found.workers) == sorted(WORKERS)
    assert len(found.jobs) == 6
    assert len(found.functions) == 3


@pytest.mark.parametrize("page", ["README.md", "docs/node.md"])
def test_what_the_guides_show_of_definitions_are_some(page: str) -> None:
    text = (EXAMPLE.parents[1] / page).read_text()
    shown = [block for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S) if block.startswith("- name")]
    assert shown
    for block in shown:
        assert read_text("shown.yml", block.encode())


# -- each by itself


def test_what_is_produced_to_kafka_is_consumed(node: Hosted) -> None:
    assert "topic='my_topic'" in node.until_shown("value=b'Hello, kafka!!'")


def test_what_is_sent_to_sqs_is_consumed_and_deleted(node: Hosted) -> None:
    node.until_shown("Created new ")
    assert node.record(node.send("sqs.send", message="Hello, SQS!!"))["state"] == "succeeded"
    assert node.until_shown("Hello, SQS!!") == "message: Hello, SQS!!\n"
    runs = node.worker("SQSConsumer")["runs"]
    node.until(lambda: node.worker("SQSConsumer")["runs"] > runs + 1, "it ends when the queue is empty")
    assert sum("Hello, SQS!!" in one for one in node.shown) == 1


def test_what_is_published_to_pubsub_is_consumed_and_acknowledged(node: Hosted, around: Outside) -> None:
    node.until_shown("topic does not exist")
    created = httpx.put(f"http://{around.http}/v1/projects/{PROJECT}/topics/handson", json={})
    assert created.status_code == 200
    node.until(lambda: around.pubsub.subscriptions, "it subscribes")
    assert node.record(node.send("pubsub.send", message="Hello, PubSub!!"))["state"] == "succeeded"
    assert json.loads(node.until_shown("Hello, PubSub!!")) == {"message": "Hello, PubSub!!"}
    node.until(lambda: around.pubsub.waiting == {"penstock": {}}, "it acknowledges")


def test_one_job_on_two_topics(node: Hosted) -> None:
    node.send("hello", name="amuro")
    node.until_shown("Hello, amuro")
    node.send("world", name="amuro")
    node.until_shown("Bye, amuro")


def test_each_step_of_an_order_issues_the_next(node: Hosted) -> None:
    taskid, topics = node.send("order.placed", id=7, price=1200, customer="amuro"), []
    for _ in range(3):
        record = node.record(taskid)
        assert record["state"] == "succeeded"
        topics.append(record["topic"])
        (run,) = record["runs"]
        taskid = run["result"]
    assert topics == ["order.placed", "order.paid", "order.shipped"]
    assert taskid is None
    node.until_shown("order 7: told amuro of parcel P-7")


def test_a_stream_over_grpc(node: Hosted) -> None:
    for number in range(3):
        node.until_shown(f'gRPC: {{"number": {number}}}')
    assert node.worker("grpc")["state"] == "running"


def test_a_stream_over_a_websocket_and_a_new_one_when_it_is_cut(node: Hosted, around: Outside) -> None:
    node.until_shown('WebSocket: {"number": 1}')
    around.cut()
    node.until_shown('WebSocket: {"number": 2}')


def test_what_is_in_the_outbox_is_published_and_what_is_refused_stays(node: Hosted) -> None:
    database = node.folder / "outbox.db"
    for topic in ("nobody.is.here", "hello"):
        added = node.record(node.send("outbox.add", topic=topic, body={"name": "row 0"}))
        assert added["state"] == "succeeded"
    with closing(sqlite3.connect(database)) as rows, rows:
        rows.executemany(
            "INSERT INTO outbox (topic, body) VALUES ('hello', ?)",
            [(json.dumps({"name": f"row {number}"}),) for number in range(1, 251)],
        )
    node.until(lambda: rows_of(database) == ["nobody.is.here"], "all others are deleted")
    shown = [f"Hello, row {number}" for number in range(251)]
    node.until(lambda: set(node.shown) >= set(shown), "each is published")
    assert sorted(one for one in node.shown if one.startswith("Hello, row ")) == sorted(shown), "once"
    failing = node.until(lambda: node.worker("reaper")["last_error"], "the worker fails, so that somebody sees it")
    assert "Unroutable" in failing
    with closing(sqlite3.connect(database)) as rows, rows:
        rows.execute("DELETE FROM outbox")


def rows_of(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as rows:
        return [topic for (topic,) in rows.execute("SELECT topic FROM outbox")]


# -- as an operator sees it


def test_it_ends_within_moments_though_residents_follow_streams(node: Hosted) -> None:
    for name in ("consumer", "grpc", "websocket"):
        node.until(lambda name=name: node.worker(name)["state"] == "running", f"{name} runs")
    began = time.monotonic()
    assert node.stop() == 0, node.log
    assert time.monotonic() - began < 25, "before the grace of 30 seconds is over"
    ending = node.log.partition("SIGTERM")[2]
    assert ending
    assert "Traceback" not in ending
    assert "WARNING" not in ending


def test_a_worker_whose_server_is_nowhere_ends_quietly_and_is_run_again(tmp_path: Path) -> None:
    hosted = Hosted(tmp_path / "node", KAFKA=f"127.0.0.1:{free_port()}")
    try:
        for name in WORKERS:
            once = name in ("consumer", "producer")  # every half a minute
            node_has = hosted.until(lambda name=name, once=once: ran(hosted, name, 1 if once else 3), f"{name} ends")
            assert (node_has["failures"], node_has["last_error"]) == (0, None)
        assert hosted.stop() == 0
        complaints = [line for line in hosted.log.splitlines() if re.search("WARNING|ERROR|CRITICAL", line)]
        spoken_of = [line for line in complaints if not re.search("aiokafka: Unable connect|penstock.watchdog", line)]
        assert spoken_of == [], "but for what the driver says, and of imports that take long"
    finally:
        hosted.close()


def ran(hosted: Hosted, name: str, times: int) -> Any:
    found = hosted.worker(name)
    return found if found["runs"] >= times and found["state"] in ("resting", "failing") else None


@pytest.mark.parametrize(
    ("left", "in_favour_of"),
    [
        ("aiobotocore.get_session", "aiobotocore.session.get_session"),
        ("gcloud.aio.pubsub.metrics_agent", "gcloud.aio.pubsub.subscribe"),
    ],
)
def test_what_the_readme_says_has_gone_from_a_library_has_gone(left: str, in_favour_of: str) -> None:
    readme = (EXAMPLE / "README.md").read_text()
    assert f"`{left}" in readme or f"`{left.rpartition('.')[2]}" in readme
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        pkgutil.resolve_name(left)
    assert callable(pkgutil.resolve_name(in_favour_of))


def test_the_unit_gives_the_node_its_time_to_end() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read(EXAMPLE / "penstock.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert int(service["TimeoutStopSec"]) > App().grace + GRACE + LAST_WAIT
    assert int(service["WatchdogSec"]) > LATE, "who asks /livez has seen it before systemd kills it"
    assert service["KillMode"] == "mixed", "what scripts have started is not told to end before the node is"
