"""Runs last: how many cases there were, and in what time."""

MINUTES = 10


def test_there_were_at_least_500_cases_within_ten_minutes(cases, seconds):
    assert cases.total >= 500, dict(cases.outcomes)
    assert seconds() < 60 * MINUTES
