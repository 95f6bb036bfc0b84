"""`penstock nodes`: every node that shares the store, found without being told where."""

from __future__ import annotations

import signal
from pathlib import Path

import penstock as package
from tests.cli.conftest import Shell
from tests.cli.hosting import Hosted, refused_port
from tests.helpers import eventually_sync


def test_nodes_of_one_store_are_told_by_each_and_vanish(tmp_path: Path) -> None:
    shell = Hosted(tmp_path)
    try:
        first, url = shell.serve()
        eventually_sync(lambda: url in shell("nodes").out)
        eventually_sync(lambda: [one["master"] and one["ready"] for one in shell("nodes", "--json").json] == [True])
        (one,) = shell("nodes", "--json").json
        keys = "id name host pid version started_at seen_at url master epoch ready workers jobs"
        assert set(one) == set(keys.split())
        assert (one["pid"], one["version"], one["url"]) == (first.process.pid, package.__version__, url)
        assert (one["master"], one["ready"], one["workers"], one["jobs"]) == (True, True, 2, 2)
        second, other = shell.serve()
        eventually_sync(lambda: other in shell("nodes", "--url", url).out)
        for asked in (url, other):
            found = shell("nodes", "--url", asked, "--json").json
            assert {node["pid"] for node in found} == {first.process.pid, second.process.pid}
            assert [node["master"] for node in found].count(True) == 1
        head, *rows = shell("nodes", PENSTOCK_URL=other).out.splitlines()
        assert head.split() == ["node", "id", "process", "version", "url", "state", "workers", "jobs", "up", "seen"]
        assert len(rows) == 2
        assert sum("master, epoch" in row for row in rows) == 1
        first.send(signal.SIGTERM)
        assert first.ended() == 0
        eventually_sync(lambda: [node["master"] for node in shell("nodes", "--url", other, "--json").json] == [True])
    finally:
        shell.stop()


def test_a_node_is_found_by_its_file_and_not_after_its_end(tmp_path: Path) -> None:
    shell = Hosted(tmp_path)
    try:
        running, url = shell.serve()
        assert shell("nodes", "--json").json[0]["pid"] == running.process.pid
        (file,) = (tmp_path / "run" / "penstock").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        file.chmod(0o644)
        assert "others can open" in shell("nodes", "--url", url, status=1).error
        file.chmod(0o600)
        running.send(signal.SIGKILL)
        running.ended()
        assert "no node answers at" in shell("nodes", "--url", url, status=1).error
    finally:
        shell.stop()


def test_where_no_node_is_known_the_usual_port_is_asked(penstock: Shell) -> None:
    environment = {"XDG_RUNTIME_DIR": str(penstock.folder), "PENSTOCK_URL": ""}
    error = penstock("nodes", status=None, **environment).err
    assert "http://127.0.0.1:8470" in error
    port = refused_port()
    error = penstock("nodes", "--url", f"http://127.0.0.1:{port}", status=1, **environment).error
    assert error.startswith(f"no node answers at http://127.0.0.1:{port}: is `penstock serve` running there?")


def test_the_url_may_stand_in_a_file_and_the_token_may_not(penstock: Shell) -> None:
    port = refused_port()
    file = penstock.folder / "penstock.toml"
    file.write_text(f'url = "http://127.0.0.1:{port}"\n')
    assert f":{port}: is" in penstock("workers", status=1).error
    assert f":{port}: is" in penstock("tasks", status=1).error
    assert penstock("queues", "--broker", "sqlite:///none.db", "--json").json == [], "a broker is asked directly"
    assert penstock("tasks", "--json", PENSTOCK_URL="").json == []
    file.write_text('token = "abc"\n')
    error = penstock("workers", status=1).error
    assert "PENSTOCK_TOKEN" in error
    assert "abc" not in error
