"""`penstock serve` as a process: what is wrong is a clear line each, and it answers from the first moment on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.helpers import eventually_sync

JOB = "- name: job\n  topics: [topic]\n  script: return 1\n"
TOKEN = "a-token-that-only-this-test-knows-of"


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return {**kept, "XDG_RUNTIME_DIR": str(folder / "run"), "PENSTOCK_TOKEN": TOKEN}


def serve(folder: Path, *arguments: str, token: bool = True) -> subprocess.CompletedProcess[str]:
    """One that ends by itself."""
    given = environment(folder)
    if not token:
        del given["PENSTOCK_TOKEN"]
    command = [sys.executable, "-m", "penstock", "serve", str(folder), *arguments]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=50, stdin=subprocess.DEVNULL)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    command = [sys.executable, "-m", "penstock", "serve", str(folder), "--port", str(port), *arguments]
    process = subprocess.Popen(command, env=environment(folder), stderr=subprocess.PIPE, text=True)
    try:
        yield process, port
    finally:
        process.kill()
        process.communicate()


def status(port: int, path: str) -> int | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_wrong_credentials_end_the_start_though_nothing_consumes_yet(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(JOB)
    done = serve(tmp_path, "--port", "0", "--amqp-url", "amqp://guest:wrong@127.0.0.1/")
    assert done.returncode == 1
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error")]
    assert "wrong" not in line
    assert "127.0.0.1" in line


def test_each_thing_that_is_wrong_has_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("- name: x\n  mode: both\n  script: 'def x(): pass'\n")
    (tmp_path / "b.yml").write_text(JOB.replace("return 1", "return ("))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "c.yml").write_text("key: ${oops\n")
    (tmp_path / "f.yml").write_text("- name: settings\n  code: 'def settings(): pass'\n")
    lines = serve(tmp_path).stderr.splitlines()
    files = ["a.yml:2", "b.yml:3", "configs/c.yml:1", "f.yml:1"]
    assert [line.split(": ")[:2] for line in lines] == [["error", file] for file in files]
    assert "what follows ${ does not name an environment variable" in lines[2]
    assert "something that `context` has" in lines[3]


def test_all_that_is_wrong_with_a_directory_is_told_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("- name: x\n  mode: both\n  script: 'def x(): pass'\n")
    (tmp_path / "b.yml").write_text(JOB.replace("return 1", "return ("))
    done = serve(tmp_path)
    assert done.returncode == 1
    assert "a.yml:2: mode is 'single' or 'multi', not 'both'" in done.stderr
    assert "b.yml:3: not Python" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.yml", "b.yml"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--job-queue-size", "0"), 2, "--job-queue-size must be a whole number above 0"),
        (("--job_queue_bulk_read_size", "many"), 2, "job-queue-bulk-read-size"),
        (("--worker_watch_interval", "nan"), 2, "--worker-watch-interval must be seconds"),
        (("--port", "99999"), 2, "port"),
        (("--broker", "nowhere://"), 2, "nowhere"),
        (("--store", "nats://127.0.0.1"), 2, "store"),
        (("--amqp-url", "redis://127.0.0.1"), 2, "redis://127.0.0.1 is no URL of RabbitMQ"),
        (("--colour", "red"), 2, "--colour"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    (tmp_path / "a.yml").write_text(JOB)
    done = serve(tmp_path, *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert says in done.stderr


def test_no_directory_is_refused(tmp_path: Path) -> None:
    done = serve(tmp_path / "none")
    assert done.returncode == 2
    assert "does not exist" in done.stderr


def test_a_port_in_use_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(JOB)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = serve(tmp_path, "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "is in use" in done.stderr


def test_another_address_than_loopback_needs_a_token(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(JOB)
    done = serve(tmp_path, "--host", "0.0.0.0", "--port", str(free_port()), token=False)
    assert done.returncode == 1
    assert "set PENSTOCK_TOKEN" in done.stderr


def test_it_answers_while_its_broker_is_away_and_ends_when_told(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(JOB)
    with serving(tmp_path, "--broker", f"amqp://127.0.0.1:{free_port()}/") as (process, port):
        eventually_sync(lambda: status(port, "/livez") == 200, "it is alive")
        assert status(port, "/readyz") == 503
        assert status(port, "/tasks") == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_it_serves_with_every_spelling_of_its_options(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(JOB)
    (tmp_path / "penstock.toml").write_text('job_queue_size = 10\nworker_watch_interval = 2\nlog_level = "debug"\n')
    spelt = ("--worker_watch_interval", "3", "--job-queue-bulk-read-size", "4", "--name", "one")
    with serving(tmp_path, *spelt) as (process, port):
        eventually_sync(lambda: status(port, "/readyz") == 200, "it is ready")
        assert (tmp_path / "penstock.db").exists()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_what_requirements_list_is_installed_before_anything_starts(tmp_path: Path) -> None:
    """A wheel of one module, made here, and taken out again."""
    wheel = tmp_path / "penstock_probe-1.0-py3-none-any.whl"
    about = "penstock_probe-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("penstock_probe.py", "FOUND = 'there'\n")
        made.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: penstock-probe\nVersion: 1.0\n")
        made.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        made.writestr(f"{about}/RECORD", "penstock_probe.py,,\n")
    (tmp_path / "requirements.txt").write_text(f"--no-index\n{wheel}\n")
    (tmp_path / "a.yml").write_text(
        "- name: a\n  mode: multi\n  script: |-\n    def a():\n        import penstock_probe\n"
        "        open('said', 'w').write(penstock_probe.FOUND)\n"
    )
    try:
        with serving(tmp_path, "--install") as (process, _):
            eventually_sync(lambda: (tmp_path / "said").exists() or process.poll() is not None, "it runs", 50)
            assert (tmp_path / "said").read_text() == "there"
    finally:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-qy", "penstock-probe"], check=True)


def test_what_cannot_be_installed_is_one_line_and_the_end(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("--no-index\nno-such-thing-at-all==1\n")
    done = serve(tmp_path, "--install")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "requirements.txt: pip failed: ERROR: No matching distribution found for no-such-thing-at-all" in line


def test_a_stop_in_the_midst_of_installing_leaves_no_pip_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes the request, and never answers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/slow-1.0.tar.gz"
        (tmp_path / "requirements.txt").write_text(f"{url}\n")
        with serving(tmp_path, "--install") as (process, _):
            listener.settimeout(30)
            wire, _ = listener.accept()
            with wire:
                pip = psutil.Process(process.pid).children()
                assert "pip" in " ".join(pip[0].cmdline())
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
                assert not pip[0].is_running()
