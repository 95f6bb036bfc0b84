"""Logins with keys: a plain nkey, and credentials with a token that an account has signed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import nkeys  # type: ignore[import-untyped]
import pytest

from penstock import App
from penstock.brokers import registry
from penstock.brokers.base import Queue
from penstock.errors import BrokerRefused, BrokerUnavailable
from penstock.testing.conformance.harness import message
from penstock.testing.faults import NatsNode
from tests.conformance.test_nats_own import server
from tests.helpers import eventually

pytestmark = pytest.mark.blocks  # the server is started here


class Key(NamedTuple):
    """A pair of keys as NATS writes them."""

    seed: str
    public: str

    def token(self, subject: Key, name: str, claims: dict[str, Any], **more: Any) -> str:
        """A signed statement about `subject`."""
        body = {
            "iat": int(time.time()),
            "iss": self.public,
            "name": name,
            "sub": subject.public,
            "nats": claims,
            **more,
        }
        digest = hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).digest()
        body["jti"] = base64.b32encode(digest).decode().rstrip("=")
        said = f"{_web({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_web(body)}"
        signature = nkeys.from_seed(bytearray(self.seed.encode())).sign(said.encode())
        return f"{said}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def _web(part: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part, separators=(",", ":")).encode()).decode().rstrip("=")


def key(kind: int) -> Key:
    seed = nkeys.encode_seed(os.urandom(32), kind)
    return Key(seed.decode(), nkeys.from_seed(bytearray(seed)).public_key.decode())


def user() -> Key:
    return key(nkeys.PREFIX_BYTE_USER)


def credentials(token: str, seed: str, end: str = "\n") -> str:
    """The file as NATS's own tools write it."""
    lines = [
        "-----BEGIN NATS USER JWT-----", token, "------END NATS USER JWT------", "",
        "************************* IMPORTANT *************************",
        "NKEY Seed printed below can be used to sign and prove identity.", "",
        "-----BEGIN USER NKEY SEED-----", seed, "------END USER NKEY SEED------", "",
    ]  # fmt: skip
    return end.join(lines)


class Realm:
    """An operator with one account, of which tokens are had."""

    def __init__(self) -> None:
        self.operator, self.system, self.account = (
            key(kind) for kind in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_ACCOUNT)
        )

    def config(self) -> str:
        """Of a server that knows the accounts by heart."""
        says = self.operator.token
        limits = {"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "conn": -1, "leaf": -1}
        room = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
        ours = says(self.account, "ours", {"type": "account", "version": 2, "limits": {**limits, **room}})
        system = says(self.system, "SYS", {"type": "account", "version": 2, "limits": limits})
        realm = says(self.operator, "realm", {"type": "operator", "version": 2, "system_account": self.system.public})
        return f"""operator: {realm}
            resolver: MEMORY
            resolver_preload: {{ {self.account.public}: {ours}, {self.system.public}: {system} }}"""

    def token(self, who: Key, expires: float | None = None, account: Key | None = None) -> str:
        """`expires` in seconds from now."""
        limits = {"subs": -1, "data": -1, "payload": -1}
        end = {} if expires is None else {"exp": int(time.time() + expires)}
        return (account or self.account).token(who, "me", {"type": "user", "version": 2, **limits}, **end)


@pytest.fixture(scope="module")
def realm() -> Realm:
    return Realm()


@pytest.fixture(scope="module")
def signed(realm: Realm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsNode]:
    with server(tmp_path_factory.mktemp("signed"), realm.config()) as node:
        yield node


@pytest.fixture(scope="module")
def me() -> Key:
    return user()


@pytest.fixture(scope="module")
def keyed(me: Key, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsNode]:
    with server(tmp_path_factory.mktemp("keyed"), f"authorization {{ users: [ {{ nkey: {me.public} }} ] }}") as node:
        yield node


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "login"
        path.write_bytes(text.encode())
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)
        return path

    return write


async def works(url: str) -> None:
    broker = registry.connect(url)
    await broker.open()
    await broker.declare(Queue("work"))
    assert list(await broker.publish([message("work")])) == [None]
    await broker.close()


async def refusal(url: str, *secrets: str) -> str:
    """What a start ends with: one line, without any of the secrets."""
    app = App(url)

    @app.route("work")
    async def work(messages: Any) -> None: ...

    with pytest.raises(BrokerRefused) as caught:
        async with app:
            pass
    said = str(caught.value)
    assert "\n" not in said
    assert not [secret for secret in secrets if secret in said or secret[:20] in said]
    return said


# -- a plain key


@pytest.mark.parametrize("form", ["{}", "{}\n", "  {}\r\n"])
async def test_an_nkey_is_a_login(keyed: NatsNode, me: Key, file: Callable[[str], Path], form: str) -> None:
    await works(keyed.url(nkeys_seed=file(form.format(me.seed))))


async def test_a_seed_may_stand_in_the_url_and_is_shown_nowhere(
    keyed: NatsNode, me: Key, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        await works(keyed.url(nkeys_seed=me.seed))
        other = user().seed
        assert "refuses the login" in await refusal(keyed.url(nkeys_seed=other), other)
    assert me.seed not in caplog.text
    assert other not in caplog.text


async def test_a_key_that_the_server_does_not_know_is_refused(keyed: NatsNode, file: Callable[[str], Path]) -> None:
    other = user().seed
    said = await refusal(keyed.url(nkeys_seed=file(other)), other)
    assert said.startswith(f"nats://127.0.0.1:{keyed.port}/ refuses the login")


SPOILT: dict[str, Callable[[str], str]] = {
    "cut off": lambda seed: seed[:-8],
    "in small letters": lambda seed: seed.lower(),
    "twice": lambda seed: seed + seed,
    "empty": lambda seed: "",
    "another letter first": lambda seed: f"X{seed[1:]}",
}


@pytest.mark.parametrize("spoilt", SPOILT.values(), ids=SPOILT)
async def test_a_seed_that_is_none_is_refused_in_a_file_and_in_the_url(
    keyed: NatsNode, me: Key, file: Callable[[str], Path], spoilt: Callable[[str], str]
) -> None:
    seed = spoilt(me.seed)
    secrets = [seed] if seed else []
    assert "nkeys_seed" in await refusal(keyed.url(nkeys_seed=file(seed)), *secrets)
    assert "nkeys_seed" in await refusal(keyed.url(nkeys_seed=seed), *secrets)


async def test_a_password_where_a_key_is_asked_for_is_refused(keyed: NatsNode) -> None:
    assert "refuses the login" in await refusal(keyed.url(login="me:sesame"), "sesame")


# -- credentials


@pytest.mark.parametrize("end", ["\n", "\r\n"])
async def test_credentials_are_a_login(
    signed: NatsNode, realm: Realm, me: Key, file: Callable[[str], Path], end: str
) -> None:
    await works(signed.url(creds=file(credentials(realm.token(me), me.seed, end))))


async def test_credentials_that_do_not_hold_are_refused(
    signed: NatsNode, realm: Realm, me: Key, file: Callable[[str], Path]
) -> None:
    stranger = key(nkeys.PREFIX_BYTE_ACCOUNT)
    tokens = {
        "of an account that the server does not know": (realm.token(me, account=stranger), me.seed),
        "of somebody else": (realm.token(user()), me.seed),
        "expired": (realm.token(me, expires=-10), me.seed),
        "tampered with": (realm.token(me)[:-6] + "AAAAAA", me.seed),
    }
    for what, (token, seed) in tokens.items():
        said = await refusal(signed.url(creds=file(credentials(token, seed))), token, seed)
        assert "refuses the login" in said, what
    assert "refuses the login" in await refusal(signed.url())


async def test_files_that_hold_no_credentials_are_refused(
    signed: NatsNode, realm: Realm, me: Key, file: Callable[[str], Path]
) -> None:
    token = realm.token(me)
    for text in (
        token,
        me.seed,
        credentials(token, "SU"),
        credentials(token, me.seed.lower()),
        credentials("", me.seed),
    ):
        said = await refusal(signed.url(creds=file(text)), token, me.seed)
        assert "holds no user's token and seed" in said
    spoilt = me.seed[:30] + "AAAA" + me.seed[34:]
    assert await refusal(signed.url(creds=file(credentials(token, spoilt))), token, spoilt)
    given = quote(credentials(token, me.seed), safe="")  # not a file's name, but what should be in it
    assert "creds" in await refusal(signed.url(creds=given), token, me.seed, given)
    for given in (token[:100], f"{token[:100]}/", f"{me.seed}.nk"):
        assert "creds: No such file" in await refusal(signed.url(creds=given), given)
        assert "nkeys_seed: No" in await refusal(signed.url(nkeys_seed=given), given)
    for path in (f"/no/{user().public}.nk", "me.creds"):
        assert f"creds: {path} No such file" in await refusal(signed.url(creds=path))


async def test_what_is_in_the_file_when_a_connection_is_made_counts(
    signed: NatsNode, realm: Realm, me: Key, file: Callable[[str], Path]
) -> None:
    """A token ends a connection when it expires; the next one has the token that was written meanwhile."""
    held = file(credentials(realm.token(me, expires=2), me.seed))
    broker: Any = registry.connect(signed.url(creds=held))
    await broker.open()
    await broker.declare(Queue("work"))
    file(credentials(realm.token(me), me.seed))
    await eventually(lambda: broker.link.current is None, "the token has expired")
    assert list(await broker.publish([message("work")])) == [None]
    await broker.close()


async def test_all_servers_of_a_cluster_are_signed_in_to_alike(
    keyed: NatsNode, me: Key, file: Callable[[str], Path]
) -> None:
    url = f"nats://127.0.0.1:1/?servers=127.0.0.1:{keyed.port}&nkeys_seed="
    await works(f"{url}{file(me.seed)}")
    other = user().seed
    both = f"nats://127.0.0.1:{keyed.port}/?servers=localhost:{keyed.port}&nkeys_seed="
    assert (await refusal(f"{both}{other}", other)).count("refuses the login") == 2
    spoilt = f"S7{other[2:]}"  # which is known before any of them is asked
    assert "nkeys_seed" in await refusal(f"{url}{spoilt}", spoilt)
    broker = registry.connect(f"{url}{other}")  # the first of them may yet have us
    with pytest.raises(BrokerUnavailable, match="refuses the login") as caught:
        await broker.open()
    assert other not in str(caught.value)
    await broker.close()
    broker = registry.connect(f"nats://127.0.0.1:1/?servers=127.0.0.1:2&nkeys_seed={me.seed}")
    with pytest.raises(BrokerUnavailable) as caught:
        await broker.open()
    assert me.seed not in str(caught.value)
    await broker.close()
