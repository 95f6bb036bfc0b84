"""Three nodes that share a store: killed, halted, cut off and redefined. One of them is the master, and all agree."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from penstock.testing.faults import Proxy, RedisNode
from penstock.testing.faults.cable import Cable
from penstock.testing.faults.serving import NodeProcess
from tests.helpers import eventually_sync
from tests.servers import require

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(150)]

FAULTS = int(os.environ.get("FAULTS_CLUSTER", "5"))  # 20 take two to three minutes on each store
TAKEN_OVER = 10.0  # seconds
APPLIED = 5.0  # seconds
SETTLED = 30.0  # seconds; a node that has gone is shown for 15
UNDISTURBED = 4.0  # seconds between two marks of a worker that nothing happens to, on a busy machine
SECRET = "of-this-very-server"

MARKS = """
- name: {name}
  mode: {mode}
  watch_interval: 0.01
  script: |
    import os
    import time

    ledger = os.open(os.environ["FAULTS_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(event, at, run):
        line = f"{{at:.6f}} {{event}} {name} {version} {{run}} {{Runtime.epoch() or 0}} {{os.getpid()}}\\n"
        os.write(ledger, line.encode())
        if event != "mark":
            os.fdatasync(ledger)

    async def {name}():
        run, begun = os.urandom(4).hex(), False
        try:
            for _ in range({marks}):
                now = time.monotonic()  # before it asks: it may be halted in between
                if not Runtime.running():
                    return
                note("mark" if begun else "begun", now, run)
                begun = True
                await asyncio.sleep(0.02)
        finally:
            if begun:
                note("ended", time.monotonic(), run)
"""
ENDLESS = 10**9
JOB = """
- name: greet
  topics: [hello]
  script: return task.content.name
"""


class Mark(NamedTuple):
    """What a worker noted of itself; `at` is monotonic, the same for all processes."""

    at: float
    event: str
    """`begun`, `mark`: it may run, as it found after that moment; `ended`."""
    worker: str
    version: str
    run: str
    epoch: int
    pid: int


def worker(name: str, mode: str, *, version: str = "1", marks: int = ENDLESS) -> str:
    """The YAML of a worker that marks the ledger every 0.02 s; `marks`: after so many a run ends by itself."""
    return MARKS.format(name=name, mode=mode, version=version, marks=marks)


class Cluster:
    """Some nodes with a directory each and one ledger."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ledger = folder / "ledger"
        self._stack = ExitStack()
        self.nodes: list[NodeProcess] = []
        self.url = ""

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, name: str, url: str = "", **options: Any) -> NodeProcess:
        """Start a node; `url`: another way to the store that all share."""
        place = ["--broker", url or self.url, "--store", url or self.url]
        environment = {"FAULTS_LEDGER": str(self._ledger)}
        node = NodeProcess(self._folder / name, *place, environment=environment, **options)
        self.nodes.append(self._stack.enter_context(node))
        return node

    @property
    def file(self) -> Path | None:
        """The store that all share, if it is an SQLite file."""
        return Path(self.url.removeprefix("sqlite:///")) if self.url.startswith("sqlite:") else None

    def write(self, name: str, file: str, text: str) -> None:
        """Into a node's directory, at once whole."""
        path = self._folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(text)
        new.rename(path)

    def remove(self, name: str, file: str) -> None:
        (self._folder / name / file).unlink()

    def ready(self) -> None:
        for node in self.nodes:
            node.wait_until_ready()

    @property
    def pids(self) -> set[int]:
        """Of all nodes."""
        return {node.pid for node in self.nodes if node.pid is not None}

    def of(self, pid: int) -> NodeProcess:
        (node,) = [node for node in self.nodes if node.pid == pid]
        return node

    def logs(self) -> str:
        return "\n".join(f"--- {node.name}\n{node.log[-4000:]}" for node in self.nodes)

    # -- what the workers noted

    def marks(self, name: str, version: str | None = None) -> list[Mark]:
        """In the order in which they were written."""
        if not self._ledger.exists():
            return []
        complete, _, _ = self._ledger.read_text().rpartition("\n")
        found = []
        for line in complete.splitlines():
            at, event, worker, told, run, epoch, pid = line.split()
            if worker == name and version in (None, told):
                found.append(Mark(float(at), event, worker, told, run, int(epoch), int(pid)))
        return found

    def marked_since(self, since: float, name: str, version: str | None = None) -> set[int]:
        """The processes in which it ran after a moment."""
        return {mark.pid for mark in self.marks(name, version) if mark.at > since and mark.event != "ended"}

    def wait_for_epoch_after(self, epoch: int) -> Mark:
        """The first mark of the master after the one of that epoch."""

        def newer() -> list[Mark]:
            return [mark for mark in self.marks("lone") if mark.epoch > epoch]

        eventually_sync(newer, f"somebody runs it after epoch {epoch}\n{self.logs()}", TAKEN_OVER + 5)
        return newer()[0]

    def wait_until_on_all(self, name: str, version: str | None = None, within: float = APPLIED) -> None:
        since = time.monotonic()
        what = f"{name} {version or ''} runs on every node"
        eventually_sync(lambda: self.marked_since(since, name, version) == self.pids, what, within)

    def wait_for_states(self, name: str, states: list[str]) -> None:
        """Until a worker is said to stand so on the nodes, in whatever order."""

        def stand() -> bool:
            return sorted(one["state"] for one in self.nodes[-1].get(f"/workers/{name}")["nodes"]) == states

        eventually_sync(stand, f"{name} is {', '.join(states)}\n{self.logs()}", APPLIED)

    def wait_until_settled(self) -> None:
        """All nodes see all nodes, and the same one as master."""
        names = {node.name for node in self.nodes}

        def agreed() -> bool:
            seen = [node.get("/nodes") for node in self.nodes]
            masters = [[view["id"] for view in views if view["master"]] for views in seen]
            assert all(len(one) <= 1 for one in masters), seen
            whole = all({view["name"] for view in views} == names and len(views) == len(names) for views in seen)
            return whole and masters[0] != [] and all(one == masters[0] for one in masters) and _all_ready(seen)

        eventually_sync(agreed, f"all agree on the nodes\n{self.logs()}", SETTLED)


def _all_ready(seen: Sequence[Sequence[Any]]) -> bool:
    return all(view["ready"] for views in seen for view in views)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def shared(request: pytest.FixtureRequest, cluster: Cluster, tmp_path: Path) -> Cluster:
    """A cluster on each kind of store."""
    if request.param == "sqlite":
        cluster.url = f"sqlite:///{tmp_path / 'shared.db'}"
    else:
        cluster.url = str(request.getfixturevalue(f"{request.param}_url"))
    return cluster


# -- what has to hold of the marks


def assert_one_at_a_time(marks: Sequence[Mark], halts: Counter[int]) -> None:
    """No two runs of a `single` worker overlap.

    1. By the moments before which they asked `Runtime.running()`: once a later epoch has its first mark, no
       earlier one has another. That holds of every process, whatever happened to it.
    2. Each epoch is one process's.
    3. A run lasts from its first mark to its end, and no other one begins meanwhile. Of a process that was
       halted (`halts`: how often) a run ends with its last mark: it may write that it has ended when it wakes.
    4. In the order of writing: what a process wrote after another had begun is one mark for each time that it
       was halted, between asking and writing.
    """
    went = [mark for mark in marks if mark.event != "ended"]
    back = [pair for pair in itertools.pairwise(sorted(went)) if pair[0].epoch > pair[1].epoch]
    assert not back, f"marked under an earlier epoch: {back[0]}"
    assert len({(mark.epoch, mark.pid) for mark in went}) == len({mark.epoch for mark in went})
    runs: dict[str, list[Mark]] = {}
    for mark in marks:
        if mark.event != "ended" or not halts[mark.pid]:
            runs.setdefault(mark.run, []).append(mark)
    spans = sorted((min(run).at, max(run).at, run[0]) for run in runs.values())
    for (_, end, one), (begin, _, other) in itertools.pairwise(spans):
        assert end <= begin, f"{one} and {other} ran at once"
    newest, late = 0, Counter[int]()
    for mark in went:
        newest = max(newest, mark.epoch)
        late[mark.pid] += mark.epoch < newest
    assert all(times <= halts[pid] for pid, times in late.items()), (late, halts)


def handovers(marks: Sequence[Mark]) -> list[float]:
    """The seconds between the last mark of each epoch and the first of the next one."""
    in_time = sorted(mark for mark in marks if mark.event != "ended")
    return [later.at - earlier.at for earlier, later in itertools.pairwise(in_time) if later.epoch != earlier.epoch]


def longest_pause(marks: Sequence[Mark], pid: int, since: float = 0.0) -> float:
    """The longest time between two marks in a process."""
    moments = sorted(mark.at for mark in marks if mark.pid == pid and mark.at >= since)
    assert len(moments) > 1
    return max(later - earlier for earlier, later in itertools.pairwise(moments))


# -- the master is lost


@pytest.mark.timeout(120 + 15 * FAULTS)
def test_one_master_at_a_time_however_often_it_is_killed_and_halted(shared: Cluster) -> None:
    shared.write("a", "work.yml", worker("lone", "single", marks=50) + worker("everywhere", "multi"))
    for name in "abc":
        shared.add(name)
    shared.ready()
    rng, epoch = random.Random(5), 0
    halted: NodeProcess | None = None
    halts, lives = Counter[int](), set[int]()
    for fault in range(FAULTS):
        first = shared.wait_for_epoch_after(epoch)
        epoch = first.epoch
        time.sleep(rng.uniform(0, 0.3))
        node = shared.of(first.pid)
        lives |= shared.pids
        if halted is not None:  # the one before comes back while the next one is lost
            halted.go_on()
            halted = None
        if fault % 2:
            node.halt(shared.file)
            halts[first.pid] += 1
            halted = node
        else:
            node.kill()
            node.start()
    shared.wait_for_epoch_after(epoch)
    if halted is not None:
        halted.go_on()
    shared.ready()
    shared.wait_until_settled()
    lives |= shared.pids
    shared.wait_until_on_all("everywhere")
    shared.wait_for_states("everywhere", ["running"] * 3)
    shared.wait_for_states("lone", ["running", "waiting", "waiting"])
    gaps = handovers(shared.marks("lone"))
    assert [node.stop() for node in shared.nodes] == [0, 0, 0], shared.logs()

    assert_one_at_a_time(shared.marks("lone"), halts)
    print(f"{FAULTS} masters lost, taken over within {', '.join(f'{gap:.1f}' for gap in sorted(gaps))} s")
    assert len(gaps) >= FAULTS
    assert max(gaps) <= TAKEN_OVER
    everywhere = shared.marks("everywhere")
    assert {mark.pid for mark in everywhere} == lives
    for pid in lives - set(halts):
        assert longest_pause(everywhere, pid) <= UNDISTURBED


# -- a node is cut off


class Line(NamedTuple):
    """The way of one node to the store."""

    url: str
    cut: Callable[[], object]
    heal: Callable[[], object]
    options: dict[str, Any]
    """Of that node."""
    in_reach: bool
    """Whether its HTTP answers while it is cut."""


@pytest.fixture(scope="session")
def namespaces() -> bool:
    """Whether network namespaces can be made here."""
    return Cable.possible()


@pytest.fixture(params=["proxy", "namespace"])
def line(request: pytest.FixtureRequest, cluster: Cluster, tmp_path: Path) -> Iterator[Line]:
    """A node that can be cut off from a Redis server of our own, through a proxy or on a cable of its own."""
    require("redis")
    with ExitStack() as stack:
        if request.param == "proxy":
            node = stack.enter_context(RedisNode(tmp_path / "redis"))
            proxy = stack.enter_context(Proxy(node.port))
            cluster.url = node.url()
            yield Line(node.url(port=proxy.port), proxy.swallow, proxy.restore, {}, in_reach=True)
            return
        if not request.getfixturevalue("namespaces"):
            pytest.skip("network namespaces need root, and iproute2")
        cable = stack.enter_context(Cable())
        node = RedisNode(tmp_path / "redis", bind=["127.0.0.1", cable.here], requirepass=SECRET)
        stack.enter_context(node)
        cluster.url = f"redis://:{SECRET}@127.0.0.1:{node.port}/0"
        url = f"redis://:{SECRET}@{cable.here}:{node.port}/0"
        yield Line(url, cable.pull, cable.plug, {"host": cable.there, "within": cable.within}, in_reach=False)


def assert_it_joins_again(cluster: Cluster, far: NodeProcess) -> None:
    """A node that was cut off runs what was defined meanwhile, and all agree."""
    assert far.pid is not None
    what = f"it applies what was defined meanwhile\n{cluster.logs()}"
    eventually_sync(lambda: far.pid in cluster.marked_since(0.0, "later"), what, SETTLED)
    cluster.wait_until_settled()
    cluster.wait_until_on_all("everywhere")


def define_later(cluster: Cluster, far: NodeProcess) -> None:
    """A new worker, on all but one node."""
    near = [node for node in cluster.nodes if node is not far]
    assert near[0].ask("PUT", "/definitions/workers/later", worker("later", "multi")).status == 200
    pids = {node.pid for node in near}
    eventually_sync(lambda: cluster.marked_since(0.0, "later") == pids, "the others have it", APPLIED)


def test_a_master_that_is_cut_off_ends_its_single_workers_before_another_begins(cluster: Cluster, line: Line) -> None:
    cluster.write("far", "work.yml", worker("lone", "single", marks=50) + worker("everywhere", "multi"))
    far = cluster.add("far", line.url, **line.options)
    first = cluster.wait_for_epoch_after(0)
    cluster.add("b")
    cluster.add("c")
    cluster.ready()
    assert far.pid == first.pid
    line.cut()
    second = cluster.wait_for_epoch_after(first.epoch)
    assert second.pid != far.pid
    define_later(cluster, far)
    if line.in_reach:
        eventually_sync(lambda: not far.ready, "it is ready no more", SETTLED)
    since = time.monotonic()
    assert far.pid not in cluster.marked_since(0.0, "later")
    line.heal()
    assert_it_joins_again(cluster, far)
    marks = cluster.marks("lone")
    assert_one_at_a_time(marks, Counter())
    assert max(handovers(marks)) <= TAKEN_OVER
    assert len({mark.epoch for mark in marks}) == 2, "it leaves its successor alone"
    ended = [mark.at for mark in marks if mark.epoch == first.epoch and mark.event == "ended"]
    assert max(ended) < second.at
    everywhere = [mark for mark in cluster.marks("everywhere") if mark.pid == far.pid]
    assert {mark.event for mark in everywhere} == {"begun", "mark"}
    assert len({mark.run for mark in everywhere}) == 1
    assert longest_pause(everywhere, first.pid) <= UNDISTURBED
    assert everywhere[-1].at > since


@pytest.mark.parametrize("line", ["proxy"], indirect=True)
def test_a_node_that_is_cut_off_and_no_master_disturbs_nobody(cluster: Cluster, line: Line) -> None:
    cluster.write("b", "work.yml", worker("lone", "single", marks=50) + worker("everywhere", "multi"))
    cluster.add("b")
    first = cluster.wait_for_epoch_after(0)
    cluster.add("c")
    far = cluster.add("far", line.url)
    cluster.ready()
    cluster.wait_until_on_all("everywhere")
    line.cut()
    define_later(cluster, far)
    eventually_sync(lambda: not far.ready, "it is ready no more", SETTLED)
    assert far.pid is not None
    assert far.pid not in cluster.marked_since(0.0, "later")
    line.heal()
    assert_it_joins_again(cluster, far)
    marks = cluster.marks("lone")
    assert {mark.epoch for mark in marks} == {first.epoch}
    assert longest_pause(marks, first.pid) <= UNDISTURBED
    assert longest_pause(cluster.marks("everywhere"), far.pid) <= UNDISTURBED


# -- definitions


def outcome(node: NodeProcess, content: dict[str, Any], expire: float) -> Any:
    """The record of a task on `hello`, once it has ended."""
    sent = node.ask("POST", "/tasks", {"topic": "hello", "content": content, "expire": expire})
    assert sent.status == 202, sent

    def ended() -> Any:
        record = node.get(f"/tasks/{sent.body['taskid']}")
        return record if record["completedAt"] else None

    return eventually_sync(ended, "the task has ended")


def gone(cluster: Cluster, name: str) -> None:
    """Until a worker runs nowhere any more, and stays away."""

    def nowhere() -> bool:
        listed = [view["name"] for node in cluster.nodes for view in node.get("/workers")]
        runs = {mark.run: mark.event for mark in cluster.marks(name)}
        return name not in listed and set(runs.values()) == {"ended"}

    eventually_sync(nowhere, f"{name} is gone everywhere", APPLIED)


def test_what_is_defined_anywhere_is_in_force_everywhere_and_what_is_deleted_nowhere(shared: Cluster) -> None:
    shared.write("a", "work.yml", worker("probe", "multi"))
    shared.write("a", "jobs/greet.yml", JOB)
    a, b, c = (shared.add(name) for name in "abc")
    shared.ready()
    shared.wait_until_on_all("probe", "1")
    shared.write("a", "work.yml", worker("probe", "multi", version="2"))  # a file of one node
    shared.wait_until_on_all("probe", "2")
    last = {mark.run: mark for mark in shared.marks("probe", "1")}
    assert {mark.event for mark in last.values()} == {"ended"}
    assert b.ask("PUT", "/definitions/workers/guest", worker("guest", "multi")).status == 200  # over HTTP
    shared.wait_until_on_all("guest")
    shared.add("d").wait_until_ready()  # with an empty directory
    shared.wait_until_on_all("guest")
    shared.wait_until_on_all("probe", "2")
    assert [[one["name"] for one in node.get("/definitions/jobs")] for node in shared.nodes] == [["greet"]] * 4

    assert c.ask("DELETE", "/definitions/workers/guest").status == 204
    gone(shared, "guest")
    assert outcome(c, {"name": "Neo"}, 10)["runs"][0]["result"] == "Neo"
    shared.remove("a", "jobs/greet.yml")
    eventually_sync(lambda: all(view["jobs"] == 0 for view in a.get("/nodes")), "the job is gone", APPLIED)
    assert [node.get("/definitions/jobs") for node in shared.nodes] == [[]] * 4
    record = outcome(b, {"name": "Neo"}, 1)
    assert record["state"] == "expired"
    assert record["runs"] == []


@pytest.mark.parametrize("shared", ["sqlite", "redis"], indirect=True)
def test_a_job_that_is_deleted_over_http_is_unbound_though_its_file_has_it(shared: Cluster) -> None:
    shared.write("a", "greet.yml", JOB)
    a, b = shared.add("a"), shared.add("b")
    shared.ready()
    assert outcome(b, {"name": "Neo"}, 10)["state"] == "succeeded"
    assert b.ask("DELETE", "/definitions/jobs/greet").status == 204
    eventually_sync(lambda: all(view["jobs"] == 0 for view in a.get("/nodes")), "the job is gone", APPLIED)
    assert outcome(a, {"name": "Neo"}, 1)["state"] == "expired"
    assert a.stop() == 0
    a.start()  # its file is as it was
    a.wait_until_ready()
    assert outcome(a, {"name": "Neo"}, 1)["state"] == "expired"
    shared.write("a", "greet.yml", JOB.replace("return", "return 'dear ' +"))
    eventually_sync(lambda: all(view["jobs"] == 1 for view in b.get("/nodes")), "the job is back", SETTLED)
    assert outcome(b, {"name": "Neo"}, 10)["runs"][0]["result"] == "dear Neo"


@pytest.mark.parametrize("shared", ["sqlite", "redis"], indirect=True)
def test_a_broken_file_changes_nothing_anywhere_and_one_worker_is_replaced_alone(shared: Cluster) -> None:
    steady = worker("steady", "multi") + worker("lone", "single")
    shared.write("a", "work.yml", worker("probe", "multi") + steady)
    a, b, _ = (shared.add(name) for name in "abc")
    shared.ready()
    for name in ("probe", "steady"):
        shared.wait_until_on_all(name)
    before = b.get("/definitions/workers")

    shared.write("a", "broken.yml", "- name: half\n  mode: multi\n  script: |\n    def half(:\n")
    shared.write("a", "work.yml", worker("probe", "multi", version="2") + steady)
    eventually_sync(lambda: "broken.yml:4: not Python" in a.log, "the log names file and line", APPLIED)
    shared.wait_until_on_all("probe", "1")
    assert b.get("/definitions/workers") == before
    assert shared.marks("probe", "2") == []
    refused = b.ask("PUT", "/definitions/workers/probe", worker("probe", "sometimes"))
    assert refused.status == 422
    assert b.get("/definitions/workers") == before

    shared.remove("a", "broken.yml")
    shared.wait_until_on_all("probe", "2")
    for version in ("3", "4", "5"):
        shared.write("a", "work.yml", worker("probe", "multi", version=version) + steady)
        shared.wait_until_on_all("probe", version)
    assert not [mark for mark in shared.marks("steady") + shared.marks("lone") if mark.event == "ended"]
    assert Counter(mark.pid for mark in shared.marks("steady") if mark.event == "begun") == Counter(shared.pids)
    assert len({mark.run for mark in shared.marks("lone")}) == 1
    assert all(longest_pause(shared.marks("steady"), pid) <= UNDISTURBED for pid in shared.pids)
    assert longest_pause(shared.marks("lone"), shared.marks("lone")[0].pid) <= UNDISTURBED
    shared.wait_for_states("steady", ["running"] * 3)
    assert [one["runs"] for one in b.get("/workers/steady")["nodes"]] == [1, 1, 1]
