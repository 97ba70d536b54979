"""Keys that somebody else has registered before us."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest

from turbowan.comfy import keys


class Theirs:
    RELATIVE_PYTHON_MODULE = "custom_nodes.their-pack"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict:
    there: dict = {"KSampler": object, "Shared": Theirs}
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(NODE_CLASS_MAPPINGS=there))
    return there


def test_a_key_stays_its_owners_and_the_log_names_both(registered: dict, caplog: pytest.LogCaptureFixture) -> None:
    assert keys.free({"Own": 1, "Shared": 2}) == {"Own": 1}
    assert len(caplog.messages) == 1
    assert "Shared" in caplog.text
    assert "their-pack" in caplog.text
    assert "Own" not in caplog.text


def test_free_keys_are_taken_without_a_word(registered: dict, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert keys.free({"Own": 1, "Other": 2}) == {"Own": 1, "Other": 2}
    assert not caplog.messages


@pytest.mark.parametrize(("value", "there"), [("0", False), (" Off ", False), ("1", True), ("", True)])
def test_aliases_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, value: str, there: bool) -> None:
    monkeypatch.setenv(keys.ALIASES, value)
    found = keys.free({"Own": 1, "Short": 2}, aliases=("Short",))
    assert ("Short" in found) == there
    assert "Own" in found
