"""`MU`: attribute access, however deep, over what is still a dict."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from penstock.node.mu import MU, mu, plain

DEEP: dict[str, Any] = {"name": "neo", "tags": [{"a": [1, {"b": 2}]}, "x"], "empty": {}}


def test_members_are_attributes_all_the_way_down() -> None:
    found = MU(DEEP)
    assert found.name == "neo"
    assert found.tags[0].a[1].b == 2
    assert found == DEEP
    assert isinstance(found, dict)
    assert isinstance(found.tags, list)
    assert json.loads(json.dumps(found)) == DEEP
    assert mu(found) is found


def test_what_is_put_in_later_too() -> None:
    found = MU(a=1)
    found.b = {"c": [{"d": 1}]}
    found["e"] = [{"f": 2}]
    found.update(g={"h": 3})
    found.b.c.append({"i": 4})
    found.b.c += [{"j": 5}]
    found.b.c[0] = {"k": 6}
    assert found.setdefault("l", {"m": 7}).m == 7
    assert (found.e[0].f, found.g.h, found.b.c[1].i, found.b.c[2].j, found.b.c[0].k) == (2, 3, 4, 5, 6)
    assert (found | {"n": {"o": 8}}).n.o == 8
    del found.a
    assert "a" not in found


def test_what_is_not_there_is_an_error_that_says_what_is() -> None:
    with pytest.raises(AttributeError, match="there is no 'nam': there are 'name', 'tags', 'empty'"):
        _ = MU(DEEP).nam
    with pytest.raises(AttributeError):
        del MU().x
    assert not hasattr(MU(), "__html__")
    assert MU().get("x") is None


def test_a_list_becomes_a_list_of_them() -> None:
    assert mu([{"a": 1}])[0].a == 1
    listed: Any = MU([{"a": 1}])
    assert listed[0].a == 1
    assert MU([("a", 1)]) == {"a": 1}
    assert MU(zip(["a"], [{"b": 1}], strict=True)).a.b == 1
    empty: Any = MU([])
    assert empty == []


def test_formats() -> None:
    assert MU(message="Hello, SQS!!").yaml_format == "message: Hello, SQS!!\n"
    assert MU(b=[1], a={"c": "é"}).yaml_format == "a:\n  c: é\nb:\n- 1\n"
    assert MU(a=[1]).json_format == '{\n    "a": [\n        1\n    ]\n}'
    assert MU([{"a": 1}]).yaml_format == "- a: 1\n"


def test_copies_and_pickles_are_equal() -> None:
    found = MU(DEEP)
    for other in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found)), found.copy()):
        assert other == found
        assert other.tags[0].a[1].b == 2
    assert type(plain(found)) is dict
    assert type(plain(found)["tags"]) is list
