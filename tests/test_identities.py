"""What stopped work is of: differences as they are told, and versions, which refuse nothing."""

import pytest

from makd.identities import VERSIONS, differences, shorten, versions, warn_other_versions


def test_differences_are_named_with_both_values_those_of_the_run_first():
    found = {"gone": 1, "same": 2, "budget": 0.5, "text": "a" * 64}
    wanted = {"text": "b" * 64, "same": 2, "budget": 0.4, "new": None}
    assert differences(found, wanted) == [("text", "a" * 12, "b" * 12), ("budget", "0.5", "0.4"), ("gone", "1", "None")]
    assert differences(found, wanted, ("text", "gone")) == [("budget", "0.5", "0.4")]
    assert differences(wanted, wanted) == []


@pytest.mark.parametrize(
    ("value", "told"),
    [("f" * 64, "f" * 12), ("word " * 12 + "ends", "word " * 12 + "ends"), ("x" * 81, "x" * 80 + "…"), (0.5, "0.5")],
    ids=["a hash", "a text as long as a hash", "a long text", "a number"],
)
def test_values_are_as_short_as_a_message_needs(value, told):
    assert shorten(value) == told


def test_other_versions_are_told_with_what_follows_from_them(caplog):
    now = versions()
    warn_other_versions({VERSIONS: {**now, "torch": "1.0"}}, {VERSIONS: now}, "The training")
    assert f"The training was begun with other versions (torch was 1.0, is {now['torch']})" in caplog.text
    assert "may differ in its last digits" in caplog.text


@pytest.mark.parametrize("before", [{}, {VERSIONS: "damaged"}, {VERSIONS: versions()}])
def test_the_same_or_unknown_versions_are_not_told_of(before, caplog):
    warn_other_versions(before, {VERSIONS: versions()}, "The training")
    assert not caplog.text
