"""`penstock config`: what is in force here and why, what a node is configured with, and never a secret."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import config
from penstock.errors import ConfigError
from tests.cli.conftest import Shell
from tests.cli.hosting import Hosted, hosted


@pytest.fixture
def shell(penstock: Shell) -> Shell:
    del penstock.environment["PENSTOCK_BROKER"]
    return penstock


def test_each_setting_says_where_it_comes_from(shell: Shell) -> None:
    file = shell.folder / "penstock.toml"
    file.write_text('store = "sqlite:///tasks.db"\nlog_format = "json"\nport = 9000\n')
    (shell.folder / "broker").write_text("amqp://neo:swordfish@rabbit/\n")
    environment: dict[str, Any] = {"PENSTOCK_BROKER_FILE": "broker", "PENSTOCK_PORT": "9001"}
    found = shell("--log-format", "console", "config", "--json", **environment).json
    settings = {one["name"]: (one["value"], one["source"], one["where"]) for one in found}
    assert settings["broker"] == ("amqp://neo:***@rabbit/", "environment", "PENSTOCK_BROKER_FILE")
    assert settings["store"] == (f"sqlite:///{shell.folder}/tasks.db", "penstock.toml", str(file))
    assert settings["port"] == (9001, "environment", "PENSTOCK_PORT")
    assert settings["log_format"] == ("console", "flag", "--log-format")
    assert settings["processes"] == (1, "default", None)
    assert [one["name"] for one in found] == sorted(settings)
    assert set(settings) == {*config.Config.__struct_fields__, "token"}


def test_a_flag_beats_all(shell: Shell) -> None:
    (shell.folder / "penstock.toml").write_text('broker = "sqlite:///file.db"\n')
    environment: dict[str, Any] = {"PENSTOCK_BROKER": "sqlite:///variable.db"}
    assert shell("config", "show", "broker", **environment).out == "sqlite:///variable.db\n"
    assert shell("config", "show", "broker", "--broker", "memory://x", **environment).out == "memory://x\n"
    found = shell("config", "show", "broker", "-H", "rabbit", "--json", **environment).json
    assert found == {"name": "broker", "value": "amqp://guest:***@rabbit:5672/", "source": "flag", "where": "-H, -P"}


def test_what_nobody_has_set_is_told_as_it_works_out(shell: Shell) -> None:
    assert shell("config", "show", "broker").out == f"sqlite:///{shell.folder}/penstock.db\n"
    assert shell("config", "show", "store").out == f"sqlite:///{shell.folder}/penstock.db\n"
    assert shell("config", "show", "store", "--broker", "amqp://rabbit/").out == "-\n"
    assert shell("config", "show", "token", "--json").json["value"] is None
    assert not list(shell.folder.glob("*.db")), "looking makes no file"


def test_no_secret_is_shown(shell: Shell) -> None:
    (shell.folder / "penstock.toml").write_text('amqp_url = "amqp://neo:swordfish@rabbit/"\n')
    environment: dict[str, Any] = {
        "PENSTOCK_TOKEN": "swordfish-and-more",
        "PENSTOCK_STORE": "redis://:swordfish@cache/",
        "PENSTOCK_URL": "",
    }
    for arguments in (["config"], ["config", "--json"], ["config", "show", "token"], ["config", "show", "store"]):
        assert "swordfish" not in shell(*arguments, **environment).out
    assert shell("config", "show", "token", **environment).out == "***\n"


def test_an_unknown_setting_suggests_the_near_one(shell: Shell) -> None:
    assert shell("config", "show", "brokr", status=1).error == "there is no setting 'brokr' (did you mean 'broker'?)"


def test_the_table_names_the_source(shell: Shell) -> None:
    lines = [line.split() for line in shell("config", PENSTOCK_LOG_LEVEL="debug").out.splitlines()]
    assert lines[0] == ["setting", "value", "from"]
    assert ["log_level", "debug", "PENSTOCK_LOG_LEVEL"] in lines
    assert ["install", "false", "default"] in lines


# -- of a node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hosted, str]]:
    with hosted(tmp_path_factory.mktemp("node")) as found:
        yield found


def test_the_configurations_of_a_node_are_listed_and_shown_masked(node: tuple[Hosted, str]) -> None:
    shell, url = node
    assert [one["name"] for one in shell("config", "--url", url, "--json").json] == ["crew/main", "db"]
    head, *rows = shell("config", "list", "--url", url).out.splitlines()
    assert head.split() == ["configuration", "file", "written", "by"]
    assert [row.split()[:2] for row in rows] == [["crew/main", "configs/crew/main.yml:1"], ["db", "configs/db.yml:1"]]
    assert shell("config", "show", "crew/main", "--url", url).out == "port: 1\n"
    text = shell("config", "show", "db", PENSTOCK_URL=url).out
    assert "host: db" in text
    assert "neo:***@db" in text
    for arguments in (["config", "show", "db"], ["config", "show", "db", "--json"], ["config", "--json"]):
        assert "swordfish" not in shell(*arguments, "--url", url).out


def test_an_unknown_configuration_is_one_line(node: tuple[Hosted, str]) -> None:
    shell, url = node
    assert "(did you mean 'crew/main'?)" in shell("config", "show", "crew/man", "--url", url, status=1).error
    for odd in ("../db", ".", "db?x=1", "db#x", "d%62", "db/"):
        assert shell("config", "show", odd, "--url", url, status=1).error


# -- the file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "did you mean 'port'?"),
        ("port = 65536", "port"),
        ("job_queue_size = 0", "job_queue_size"),
        ('worker_watch_interval = "soon"', "worker_watch_interval"),
        ('token = "x"', "PENSTOCK_TOKEN"),
    ],
)
def test_a_file_that_says_nonsense_is_refused(own_directory: Path, text: str, said: str) -> None:
    (own_directory / "penstock.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"penstock\.toml") as raised:
        config.load()
    assert said in str(raised.value)


def test_what_kubernetes_calls_a_port_is_none(own_directory: Path) -> None:
    assert config.load(environ={"PENSTOCK_PORT": "tcp://10.96.0.1:8470"}).port == 8470
    with pytest.raises(ConfigError, match="PENSTOCK_PORT"):
        config.load(environ={"PENSTOCK_PORT": "udp"})
