"""Consumers in processes of their own, with real signals: nothing is lost, little is repeated."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from penstock.testing.faults import Ledger, halt, seconds_until, wait_until
from tests.faults.scenes import LEASE, PREFETCH, Scene, SqliteScene

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(180)]


def test_kill_9_of_four_consumers_again_and_again_loses_nothing(scene: Scene) -> None:
    total, kills = scene.crowd, scene.kills
    rng = random.Random(1)
    with scene.consumers(4) as consumers:
        confirmed = scene.publish("work", list(range(total)))
        for kill in range(kills):
            goal = (kill + 1) * total // (kills + 2)
            scene.wait_for_finished(goal)
            consumers.kill(rng.choice(consumers.running))
            consumers.start()
        scene.wait_for_all(confirmed)
    finished = scene.ledger.times("finished")
    lost = set(confirmed) - set(finished)
    duplicates = sum(times - 1 for times in finished.values())
    print(f"lost {len(lost)} of {total}, duplicates {duplicates} (in flight at the kills: {kills * PREFETCH})")
    assert not lost
    assert duplicates <= kills * PREFETCH
    assert_repeats_are_counted(scene.ledger)
    assert scene.dead() == []
    assert scene.sound()


def assert_repeats_are_counted(ledger: Ledger) -> None:
    """Whatever is started again says so."""
    seen: set[str] = set()
    for entry in ledger.entries():
        if entry.event == "started":
            assert entry.attempt > 1 or entry.id not in seen, f"{entry.id} came again with attempt 1"
            seen.add(entry.id)


def test_sigterm_twenty_times_repeats_nothing_and_exits_with_0(scene: Scene) -> None:
    total, stops = 4_000, 20

    def up() -> bool:
        """Whether all of them have begun to start. A signal before that ends an interpreter, not a consumer."""
        return scene.ledger.count("up") == len(consumers.running) + len(consumers.ended)

    with scene.consumers(3) as consumers:
        confirmed = scene.publish("work", list(range(total)))
        for stop in range(stops):
            goal = (stop + 1) * total // (stops + 2)
            scene.wait_for_finished(goal)
            wait_until(up, "all are up", 20)
            consumers.send(consumers.running[0], signal.SIGTERM)
            consumers.start()
        wait_until(lambda: scene.ledger.count("finished") >= total, "all are finished", 60)
        assert consumers.ended == [0] * stops, consumers.log[-2000:]
    finished = scene.ledger.times("finished")
    lost = set(confirmed) - set(finished)
    duplicates = sum(times - 1 for times in finished.values())
    print(f"lost {len(lost)} of {total}, duplicates {duplicates}")
    assert set(finished) == set(confirmed)
    assert set(finished.values()) == {1}


def test_a_poison_message_ends_in_the_dead_letters_and_its_batch_mates_do_not(scene: Scene) -> None:
    with scene.consumers(1) as consumers:
        bodies = [*range(11), "poison", *range(12)]
        ids = scene.publish("poisoned", bodies)
        poison = ids[11]
        deaths = 0

        def judged() -> bool:
            nonlocal deaths
            deaths += consumers.replace_dead()
            return bool(scene.dead())

        took = seconds_until(judged, "the poison is in the dead letters", 90, pause=0.1)
        wait_until(lambda: len(scene.ledger.times("finished")) == len(ids) - 1, "all others are finished", 30)
        started = [entry for entry in scene.ledger.entries() if entry.id == poison and entry.event == "started"]
        print(f"in the dead letters after {deaths} deaths and {took:.1f} s")
        assert [(letter.id, letter.reason) for letter in scene.dead()] == [(poison, "crashed")]
        assert deaths == len(started) == 4, "once with its batch, three times alone"
        assert [entry.attempt for entry in started] == [1, 2, 3, 4]
    assert poison not in scene.ledger.times("finished")


def test_an_undecodable_message_goes_to_the_dead_letters_at_once_and_disturbs_nobody(scene: Scene) -> None:
    with scene.consumers(1) as consumers:
        good = scene.publish("poisoned", list(range(20)))
        (bad,) = scene.publish("poisoned", [b'{"cut off": '], headers={"content-type": "application/json"})
        good += scene.publish("poisoned", list(range(20)))
        scene.wait_for_all(good)
        wait_until(scene.dead, "it is in the dead letters", 20, pause=0.1)
        assert scene.dead() == [(bad, "invalid", 1)]
        assert consumers.replace_dead() == 0
    assert set(scene.ledger.times("started")) == set(good), "no handler has seen it"
    assert set(scene.ledger.times("finished").values()) == {1}


def test_a_slow_consumer_of_a_long_queue_holds_no_more_than_its_prefetch(scene: Scene) -> None:
    with scene.consumers(1) as consumers:
        wait_until(scene.declared, "the queues are declared", 20)
        (process,) = consumers.running
        idle = _resident(process.pid)
        for _ in range(scene.backlog // 5_000):
            scene.publish("dawdling", ["x" * 1_000] * 5_000)
        most_held = most_used = 0
        looks = 0
        done = scene.ledger.count("finished")

        def looked() -> bool:
            nonlocal most_held, most_used, looks
            most_held = max(most_held, scene.in_hand("dawdling").unsettled)
            most_used = max(most_used, _resident(process.pid))
            looks += 1
            return looks >= 10 and scene.ledger.count("finished") >= done + 200

        wait_until(looked, "it has worked for a while", 60, pause=0.1)
        print(
            f"backlog {scene.in_hand('dawdling').ready}, held at most {most_held} of {PREFETCH}, "
            f"{idle >> 20} MiB idle, at most {most_used >> 20} MiB, in {looks} looks"
        )
        assert scene.in_hand("dawdling").ready > scene.backlog // 2
        assert 0 < most_held <= PREFETCH
        assert most_used <= idle + 150 * 2**20


def _resident(pid: int) -> int:
    """Bytes of memory that a process has in use."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no memory")


def test_a_dead_consumers_messages_are_taken_over_within_the_lease(lite: SqliteScene) -> None:
    scene = lite
    with scene.consumers(2) as consumers:
        both = "SELECT count(DISTINCT port) FROM consumers"
        wait_until(lambda: scene.declared() and scene.query(both) == [(2,)], "both consume", 20)
        scene.publish("slow", ["first"])
        wait_until(lambda: scene.ledger.count("started"), "it runs", 20)
        (entry,) = [entry for entry in scene.ledger.entries() if entry.event == "started"]
        consumers.kill(next(process for process in consumers.running if process.pid == entry.pid))
        took = seconds_until(lambda: scene.ledger.count("finished"), "taken over", LEASE + 10)
        print(f"taken over after {took:.1f} s, with a lease of {LEASE} s")
        assert took <= LEASE + 2 + 1, "one second more for a busy machine"
        (survivor,) = consumers.running
        assert [entry.pid for entry in scene.ledger.entries() if entry.event == "finished"] == [survivor.pid]


def test_the_late_settlements_of_a_zombie_are_refused(lite: SqliteScene) -> None:
    """SIGSTOP past the lease, then SIGCONT: what it held has gone to another, and stays gone."""
    scene, total = lite, 60
    with scene.consumers(1) as consumers:
        ids = scene.publish("work", list(range(total)))
        wait_until(lambda: scene.ledger.count("started") >= 4, "it runs", 20, pause=0.001)
        (zombie,) = consumers.running
        halt(zombie.pid, scene.file)
        held = scene.query("SELECT count(*) FROM messages WHERE owner > 0")[0][0]
        if not held:
            pytest.fail("it was stopped too late to hold anything: make total larger")
        consumers.start()
        wait_until(lambda: len(scene.ledger.times("finished")) == total, "another finishes all", 30)
        wait_until(lambda: not scene.query("SELECT 1 FROM messages LIMIT 1"), "all are settled", 30)
        before = scene.ledger.count("finished")
        zombie.send_signal(signal.SIGCONT)
        wait_until(lambda: "lost to other consumers" in consumers.log, "it learns of its loss", 20)
        again = scene.publish("work", ["more"])
        wait_until(lambda: set(again) <= set(scene.ledger.times("finished")), "consuming goes on", 20)
        assert consumers.send(zombie, signal.SIGTERM) == 0
    finished = scene.ledger.times("finished")
    assert set(finished) == {*ids, *again}
    assert scene.ledger.count("finished") - before <= PREFETCH + 1, "at most what it was running ends twice"


def test_a_blocked_loop_is_named_and_nothing_is_lost(scene: Scene) -> None:
    with scene.consumers(1) as consumers:
        ids = scene.publish("slow", ["block", "after"])
        wait_until(lambda: set(ids) <= set(scene.ledger.times("finished")), "both are finished", 30)
        wait_until(lambda: "turns again" in consumers.log, "the end of it is told", 10)
        assert "event loop has been blocked" in consumers.log
        assert "slow (" in consumers.log
        assert "time.sleep(3.5)" in consumers.log
