"""The demo proves what it says, and would say so if it were not true."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from demo import chart, verdict
from demo.chart import Mark
from demo.verdict import Claim, Evidence, Kill

ROOT = Path(__file__).parents[2]

BATCHES = [tuple(f"{letter}{n}" for n in range(20)) for letter in "ab"]
PUBLISHED = [id for batch in BATCHES for id in batch]

GOOD = Evidence(
    published=PUBLISHED,
    stored=[(id, 1) for id in PUBLISHED] + [(id, 2) for id in BATCHES[1]],
    seen=PUBLISHED,
    kills=[Kill(1, "started", BATCHES[0], 0.0), Kill(2, "stored", BATCHES[1], 1.0)],
    prefetch=40,
    refused=[(id, 1) for id in BATCHES[0]],
    refusals=3,
    dead=0,
    left=0,
)


@contextmanager
def demo(folder: Path, **environ: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "demo", "--folder", str(folder)],
        cwd=ROOT,
        env={**{name: value for name, value in os.environ.items() if name != "BROKER"}, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its children
            process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def failing(evidence: Evidence) -> set[str]:
    return {claim.what for claim in verdict.judge(evidence) if claim.holds is False}


def test_killed_twice_and_without_its_database_it_loses_nothing(tmp_path: Path) -> None:
    with demo(tmp_path / "run", NO_COLOR="1", COLUMNS="100") as process:
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = {claim["what"]: claim["found"] for claim in report["claims"]}
    assert report["holds"] is True
    assert int(found["readings published"]) > 100
    assert found["readings stored"] == found["seen by alerts"] == found["readings published"]
    assert found["lost"] == found["dead letters"] == found["left in the queues"] == found["attempts it cost"] == "0"
    assert 2 <= int(found["stored twice"]) <= 80, "the kill after storing makes a whole batch come twice"
    assert int(found["Unavailable raised"]) >= 1
    for claim in report["claims"]:
        assert any(claim["what"] in line and claim["found"] in line for line in output.splitlines()), output
    assert "\x1b[3" not in output, "no colour was wanted"
    assert "kill 1" in output
    assert "kill 2" in output
    assert "database away" in output


def test_it_takes_its_processes_along_when_it_is_stopped(tmp_path: Path) -> None:
    with demo(tmp_path / "run") as process:
        assert process.stdout is not None
        assert "have started" in process.stdout.readline()
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert not any(child.is_running() for child in children)


def test_a_broker_that_dies_with_its_process_is_refused(tmp_path: Path) -> None:
    with demo(tmp_path / "run", BROKER="memory://") as process:
        output, _ = process.communicate(timeout=30)
    assert (process.returncode, output.count("\n")) == (2, 1), output
    assert "outlives" in output


def test_true_evidence_holds() -> None:
    assert failing(GOOD) == set()
    assert verdict.holds(verdict.judge(GOOD))


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({"stored": GOOD.stored[1:]}, {"readings stored", "lost"}),
        ({"seen": GOOD.seen[1:]}, {"seen by alerts"}),
        ({"stored": GOOD.stored * 3}, {"stored twice"}),
        ({"stored": GOOD.stored[:40]}, {"stored twice"}),
        ({"seen": GOOD.seen * 4}, {"seen twice by alerts"}),
        ({"kills": [GOOD.kills[0], replace(GOOD.kills[1], point="finished")]}, {"killed in mid-batch"}),
        ({"refusals": 0}, {"Unavailable raised"}),
        ({"refused": [("a0", 0)]}, {"attempts it cost"}),
        ({"dead": 1}, {"dead letters"}),
        ({"left": 1}, {"left in the queues"}),
        ({"published": []}, {"readings published"}),
    ],
)
def test_each_claim_fails_when_it_is_not_true(changes: dict[str, Any], fails: set[str]) -> None:
    evidence = replace(GOOD, **changes)
    assert fails <= failing(evidence)
    assert not verdict.holds(verdict.judge(evidence))


def test_what_a_system_cannot_say_is_not_claimed() -> None:
    claims = verdict.judge(replace(GOOD, dead=None, left=None))
    assert [claim.holds for claim in claims[-2:]] == [None, None]
    assert verdict.holds(claims)


def test_a_claim_that_fails_is_seen_in_the_table() -> None:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as shown:
        console.print(verdict.table([Claim("lost", "3", "0", False)]))
    assert "NO" in shown.get()


@pytest.mark.parametrize("glyphs", [chart.FULL, chart.ASCII])
def test_the_chart_shows_readings_and_marks_in_the_width_it_is_given(glyphs: chart.Glyphs) -> None:
    cpu = [(float(at), at * 10.0) for at in range(11)]
    memory = [(float(at), 50.0) for at in range(11)]
    marks = [Mark("X", "kill 1", 5, 5), Mark("-", "database away", 7, 9)]
    lines = chart.draw(cpu, memory, marks, 60, glyphs).plain.splitlines()
    assert max(map(len, lines[:-1])) < 60
    assert lines[0].startswith("100 %")
    assert lines[0].rstrip().endswith(glyphs.bars[-1])
    assert glyphs.line in lines[4]
    assert lines[chart.HEIGHT].count("X") == 1
    assert glyphs.span * 5 in lines[chart.HEIGHT]
