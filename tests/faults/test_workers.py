"""The process that runs a single worker is killed, and halted: another takes over, and no two run at once."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from penstock.testing.faults import Processes, halt
from tests.faults.scenes import ROOT
from tests.helpers import eventually_sync

FAULTS = int(os.environ.get("FAULTS_WORKERS", "4"))  # 20 take over two minutes
TAKEN_OVER = 10.0  # seconds


def read(ledger: Path) -> list[tuple[float, int, int]]:
    """When, in what epoch and by whom it was run, in the order in which that was."""
    lines = [line.split() for line in ledger.read_text().splitlines()] if ledger.exists() else []
    return sorted((float(at), int(epoch), int(who)) for at, epoch, who in lines)


def wait_for_epoch_after(epoch: int, ledger: Path) -> None:
    eventually_sync(lambda: (found := read(ledger)) and found[-1][1] > epoch, "somebody runs it", TAKEN_OVER + 5)


@pytest.mark.timeout(60 + 15 * FAULTS)
def test_one_at_a_time_whatever_becomes_of_the_process_that_runs_it(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    environment = {
        "FAULTS_STORE": f"sqlite:///{tmp_path / 'shared.db'}",
        "FAULTS_LEDGER": str(ledger),
        "PYTHONPATH": str(ROOT),
    }
    rng, epoch = random.Random(5), 0
    halted: list[subprocess.Popen[bytes]] = []
    with Processes(["-m", "tests.faults.resident"], 3, environment, tmp_path / "log") as processes:
        for fault in range(FAULTS):
            wait_for_epoch_after(epoch, ledger)
            epoch = read(ledger)[-1][1]
            time.sleep(rng.uniform(0, 0.3))
            runs = read(ledger)[-1][2]
            (process,) = [one for one in processes.running if one.pid == runs]
            for one in halted:  # the ones before come back while the next is lost
                one.send_signal(signal.SIGCONT)
            halted.clear()
            if fault % 2:
                halt(process.pid, tmp_path / "shared.db")
                halted.append(process)
            else:
                processes.kill(process)
                processes.start()
        wait_for_epoch_after(epoch, ledger)
        for one in halted:
            one.send_signal(signal.SIGCONT)
        statuses = [processes.send(process, signal.SIGTERM) for process in list(processes.running)]
    found = read(ledger)
    assert statuses == [0, 0, 0], processes.log
    assert all(earlier <= later for (_, earlier, _), (_, later, _) in itertools.pairwise(found))
    assert len({(epoch, who) for _, epoch, who in found}) == len(
        {epoch for _, epoch, _ in found}
    )  # each epoch is one process's
    gaps = [later - earlier for (earlier, _, _), (later, _, _) in itertools.pairwise(found)]
    assert max(gaps) <= TAKEN_OVER
    assert len({epoch for _, epoch, _ in found}) >= FAULTS + 1
