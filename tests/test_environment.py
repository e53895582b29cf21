from __future__ import annotations

import os

import pytest

from mmattn._environment import changed_environment


def environment() -> dict[str, str]:
    """All but what pytest changes itself."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setenv("MMATTN_TEST_A", "a")
    monkeypatch.setenv("mmattn_test_b", "b")
    monkeypatch.delenv("MMATTN_TEST_B", raising=False)
    monkeypatch.delenv("MMATTN_TEST_C", raising=False)
    return environment()


def test_variables_change_for_a_while(known):
    with changed_environment({"MMATTN_TEST_A": None, "mmattn_test_b": "other", "MMATTN_TEST_C": ""}):
        inside = known | {"mmattn_test_b": "other", "MMATTN_TEST_C": ""}
        del inside["MMATTN_TEST_A"]
        assert environment() == inside
    assert environment() == known


def test_what_is_done_to_them_meanwhile_is_undone(known):
    def fail():
        with changed_environment({"MMATTN_TEST_A": "a", "MMATTN_TEST_C": None}):
            del os.environ["MMATTN_TEST_A"]
            os.environ["MMATTN_TEST_C"] = "c"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert environment() == known


def test_a_value_that_cannot_be_set_leaves_the_others_as_they_were(known):
    with pytest.raises(ValueError, match="null"), changed_environment({"MMATTN_TEST_A": None, "MMATTN_TEST_C": "\0"}):
        pass
    assert environment() == known
