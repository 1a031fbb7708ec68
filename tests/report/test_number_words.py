"""Numbers as people read them: digits that tell something, and none that are rounded into another answer."""

import pytest

from makd.report.glance import Quality
from makd.report.words import count, number, score, seconds


@pytest.mark.parametrize(
    ("value", "told"),
    [(999.7, "1,000"), (99.96, "100"), (0.5, "0.5"), (0.12345, "0.123"), (0.00123, "0.00123"), (12345.6, "12,346"),
     (0, "0"), (1234567, "1.2e+06"), (0.0001234, "1.2e-04"), (-3.14159, "-3.14"), (None, "-")],
)  # fmt: skip
def test_a_number_has_three_digits_in_fixed_point(value, told):
    assert number(value) == told


@pytest.mark.parametrize(
    ("one", "other"), [(100.4, 99.97), (0.95283, 0.95312), (0.99964, 1.0), (20.04, 19.96)], ids=str
)
def test_scores_that_differ_in_the_fourth_digit_are_told_apart(one, other):
    assert float(score(one)) == one
    assert float(score(other)) == other


def test_a_student_that_is_nearly_perfect_is_not_told_to_be():
    assert Quality("rank correlation", 0.99964, None, None, 1.0).answer == "0.99964 of 1"
    assert "20.04, the teacher has 19.96" in Quality("perplexity", 20.04, 19.96, None, 1.0, False).explanation


def test_a_count_rises_to_the_next_word_when_it_rounds_to_it():
    assert count(999_700_000) == "1 billion"
    assert count(17_394_048) == "17.4 million"


def test_hours_have_no_exponent():
    assert seconds(3600 * 1200) == "1,200 h"
