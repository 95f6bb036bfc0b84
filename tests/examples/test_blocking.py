"""What the page promises to web apps that serve a request in a thread, and to servers that fork."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.conftest import Stage

SITE = """
import os, sys, threading
from penstock import SyncClient

client = SyncClient()  # as in the module of an app, which gunicorn --preload imports before it forks


def serve(count):
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.call("test", priority=100, timeout=20)))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["Wake up Neo.\\n"] * count, answers


serve(1 if "used" in sys.argv else 0)
children = []
for _ in range(2):
    child = os.fork()
    if not child:
        serve(8)
        sys.exit(7)  # the ordinary way, nothing being closed
    children.append(child)
serve(8)
for child in children:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
serve(8)
print("all served")
"""


@pytest.mark.parametrize("stage", ["no site"], indirect=True)
@pytest.mark.parametrize("before", ["made", "used"])
def test_a_client_from_before_a_fork_serves_parent_and_children(stage: Stage, tmp_path: Path, before: str) -> None:
    stage.start_worker()
    script = tmp_path / "prefork.py"
    script.write_text(SITE)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(script), before],
        env=stage.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "all served\n", "")
