"""The file of a node's token: of its user alone, whole at every moment, believed only while it is so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.control import tokens
from penstock.control.tokens import Told
from penstock.errors import ConfigError

TOLD = Told("http://127.0.0.1:8470", "secret", os.getpid())


def test_what_is_written_is_found_and_removed(tmp_path: Path) -> None:
    path = tokens.write(TOLD, tmp_path / "state")
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    for url in (None, TOLD.url, "http://localhost:8470/"):
        assert tokens.find(url, tmp_path / "state") == TOLD
    for url in ("http://127.0.0.1:8471", "http://10.0.0.1:8470", "https://example.org:8470"):
        assert tokens.find(url, tmp_path / "state") is None
    tokens.remove(Told(TOLD.url, "another", 1), tmp_path / "state")
    assert path.exists()
    for _ in range(2):
        tokens.remove(TOLD, tmp_path / "state")
    assert os.listdir(tmp_path / "state") == []
    assert "secret" not in repr(TOLD)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    tokens.write(TOLD, tmp_path / "state").chmod(mode)
    with pytest.raises(ConfigError, match="others can open"):
        tokens.find(TOLD.url, tmp_path / "state")


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens.write(TOLD, tmp_path / "state")
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(ConfigError, match="another user"):
        tokens.find(TOLD.url, tmp_path / "state")
    with pytest.raises(ConfigError, match="this user"):
        tokens.write(TOLD, tmp_path / "state")


def test_a_link_or_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    path = tokens.write(TOLD, tmp_path / "state")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot read"):
        tokens.find(TOLD.url, tmp_path / "state")
    (tmp_path / "state").chmod(0o777)
    with pytest.raises(ConfigError, match="no other can write"):
        tokens.write(TOLD, tmp_path / "state")


def test_the_token_of_a_dead_node_is_not_used(tmp_path: Path) -> None:
    pid = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(pid, 0)
    tokens.write(Told(TOLD.url, "old", pid), tmp_path)
    assert tokens.find(TOLD.url, tmp_path) is None


def test_without_a_url_it_is_the_only_node_s_or_the_usual_port_s(tmp_path: Path) -> None:
    other, third = (Told(f"http://127.0.0.1:{port}", str(port), os.getpid()) for port in (9001, 9002))
    tokens.write(other, tmp_path)
    assert tokens.find(None, tmp_path) == other
    tokens.write(third, tmp_path)
    assert tokens.find(None, tmp_path) is None
    tokens.write(TOLD, tmp_path)
    assert tokens.find(None, tmp_path) == TOLD


def test_the_folder_is_where_the_system_wants_it() -> None:
    assert tokens.folder({"XDG_RUNTIME_DIR": "/run/user/1", "XDG_STATE_HOME": "/s"}) == Path("/run/user/1/penstock")
    assert tokens.folder({"XDG_RUNTIME_DIR": "", "XDG_STATE_HOME": "/s"}) == Path("/s/penstock")
    assert tokens.folder({"XDG_STATE_HOME": "relative", "HOME": "/h"}) == Path("/h/.local/state/penstock")
