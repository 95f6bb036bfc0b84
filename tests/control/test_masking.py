"""What is named like a secret is not shown, however it is quoted."""

from __future__ import annotations

import json

import pytest

from penstock.control.masking import STARS, masked, values


@pytest.mark.parametrize("key", ["Authorization", "proxy-authorization", "authorisation", "Cookie", "Set-Cookie"])
def test_headers_that_let_somebody_in_are_secrets(key: str) -> None:
    assert values({"headers": {key: "hunter2"}}) == {"headers": {key: STARS}}
    assert "hunter2" not in masked(f"{key}: Token hunter2")
    assert "hunter2" not in masked(f"{key}: sid=hunter2; path=/")


@pytest.mark.parametrize("key", ["author", "Authority", "authored", "authors"])
def test_who_wrote_something_is_none(key: str) -> None:
    assert values({key: "Neo"}) == {key: "Neo"}
    assert masked(f"{key}: Neo") == f"{key}: Neo"


@pytest.mark.parametrize("secret", ["hunter2", 'hun"hunter2', "hun\\hunter2", "hun, }hunter2", "hun'hunter2"])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_json_within_json_shows_none(secret: str, separators: tuple[str, str]) -> None:
    text = json.dumps({"password": secret, "name": "Neo"}, separators=separators)
    for _ in range(3):
        shown = masked(text)
        assert "hunter2" not in shown
        assert STARS in shown
        assert "Neo" in shown
        text = json.dumps({"text": text}, separators=separators)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"password = 'a\'hunter2' here", "password = *** here"),
        (r"{'password': 'a\'\"hunter2', 'name': 'Neo'}", "{'password': ***, 'name': 'Neo'}"),
        ("password='a\\\nhunter2' here", "password=*** here"),
        ('password="a\\\nhunter2" here', "password=*** here"),
        ("password: 'it''s hunter2'", "password: ***"),
        ("password => hunter2 here", "password => *** here"),
        ('{"password"=>"hunter2", "name"=>"Neo"}', '{"password"=>***, "name"=>"Neo"}'),
        ("'secret' => 'hunter2'", "'secret' => ***"),
        (r"{password: 'a\', token: 'hunter2'}", "{password: ***}"),
    ],
)
def test_quotation_marks_of_other_languages_are_understood(text: str, shown: str) -> None:
    assert masked(text) == shown
