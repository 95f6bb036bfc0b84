"""Settings: whose file is heeded, and what of a URL is told."""

from __future__ import annotations

import grp
import logging
import os
import pwd
from pathlib import Path

import pytest

from penstock import config
from penstock.errors import ConfigError
from penstock.sqlite.address import parse_address

NOBODY = 65_534

MISTYPED = [
    "guest:s3cret@localhost:5672",
    "guest:a@s3cret@localhost",
    "amqp:/guest:s3cret@localhost",
    "amqp//guest:s3cret@localhost",
    "redis:/:s3cret@localhost",
    "nats:s3cret@localhost",
    "amqp://guest:s3cret/x@localhost",  # its port is s3cret, as it is read
    "amqp://guest:s3cret@localhost\u2100/",
    "amqp://[guest:s3cret@localhost",
]


@pytest.mark.parametrize("url", MISTYPED)
def test_a_mistyped_url_does_not_tell_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL") as raised:
        config.parse_url(url)
    for told in (config.mask(url), str(raised.value)):
        assert "s3cret" not in told
        assert "***@localhost" in told


@pytest.mark.parametrize("text", ["just words", "q.db", "git@example.org:a/b", "localhost:5672", "at 12:30 a@b"])
def test_other_text_is_told_as_it_is(text: str) -> None:
    assert config.mask(text) == text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://t0ken@a:4222?servers=t0ken@b:4222", "nats://***@a:4222?servers=***@b:4222"),
        ("nats://a?servers=b,t0ken@c,d:1&timeout=3", "nats://a?servers=b,***@c,d:1&timeout=3"),
        ("tls://a?servers=t0=ken%40b", "tls://a?servers=***@b"),
        ("nats://neo:t0ken@a/?servers=neo:t0ken@b", "nats://***@a/?servers=***@b"),
        ("nats://t0/ken@a", "nats://***@a"),
        ("nats://t0?ken@a", "nats://***@a"),
    ],
)
def test_each_server_of_nats_keeps_its_token(url: str, shown: str) -> None:
    assert config.mask(url) == shown


# -- whose penstock.toml


@pytest.fixture
def below(own_directory: Path) -> Path:
    """A directory below one with a `penstock.toml` of this user's."""
    below = own_directory / "a" / "b"
    below.mkdir(parents=True)
    (own_directory / "penstock.toml").write_text("port = 9000\n")
    (own_directory / "penstock.toml").chmod(0o644)
    return below


def _give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root can give a file to somebody else; any other user becomes somebody else."""
    if os.getuid() == 0:
        os.chown(path, NOBODY, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "getuid", lambda: NOBODY)


def test_the_users_own_file_above_is_heeded(below: Path) -> None:
    assert config.find_file(below) == below.parents[1] / "penstock.toml"
    assert config.load(below).port == 9000


def test_somebody_elses_file_above_is_passed_over(
    below: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = below.parents[1] / "penstock.toml"
    _give_away(theirs, monkeypatch)
    assert config.find_file(below) is None
    assert config.load(below).port == config.Config().port
    assert config.default_broker(below) == f"sqlite:///{below}/penstock.db"
    (told,) = caplog.records
    assert told.levelno == logging.WARNING
    assert str(theirs) in told.getMessage()
    assert "owns it" in told.getMessage()


def test_one_beyond_it_is_found(below: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    between = below.parent / "penstock.toml"
    between.write_text("port = 1\n")
    between.chmod(0o646)
    assert config.load(below).port == 9000


def test_in_the_directory_itself_whoever_wrote_it_is_heeded(below: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = below.parents[1] / "penstock.toml"
    _give_away(file, monkeypatch)
    file.chmod(0o666)
    assert config.find_file(file.parent) == file


def test_a_link_of_somebody_else_is_passed_over(below: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = below.parent / "penstock.toml"
    link.symlink_to(below.parents[1] / "penstock.toml")
    assert config.find_file(below) == link
    _give_away(link, monkeypatch)
    assert config.find_file(below) != link


@pytest.mark.parametrize(
    ("mode", "group", "members", "heeded"),
    [
        (0o646, "own", [], False),
        (0o664, "staff", [], False),
        (0o664, "own", ["mallory"], False),
        (0o664, "own", [], True),  # as where each user has a group, and a umask of 002
        (0o644, "staff", ["mallory"], True),
    ],
)
def test_a_file_above_that_others_may_write_to_is_passed_over(
    below: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: int,
    group: str,
    members: list[str],
    heeded: bool,
) -> None:
    owner = pwd.struct_passwd(("neo", "x", 1, 1, "", "/", "/bin/sh"))
    found = grp.struct_group(("neo" if group == "own" else group, "x", 1, members))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: owner)
    monkeypatch.setattr(grp, "getgrgid", lambda _: found)
    file = below.parents[1] / "penstock.toml"
    file.chmod(mode)
    assert config.find_file(below) == (file if heeded else None)
    assert ("others may write to it" in caplog.text) == (not heeded)


def test_where_files_have_no_owners_each_is_heeded(below: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getuid")
    (below.parents[1] / "penstock.toml").chmod(0o666)
    assert config.find_file(below) is not None


@pytest.mark.parametrize("url", ["sqlite://u:s3cret@h/x.db", "sqlite://u:s3cret@h"])
def test_a_path_that_is_none_shows_no_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(url)
    assert "s3cret" not in str(caught.value)
    assert "***" in str(caught.value)
