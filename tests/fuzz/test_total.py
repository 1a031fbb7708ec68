"""Runs last: how many cases there were, and in what time."""

MINUTES = 10


def test_there_were_at_least_500_cases_within_ten_minutes(cases, seconds):
    print(f"{cases.total} cases in {seconds():.0f} s: {dict(cases.outcomes)}")
    assert cases.total >= 500
    assert seconds() < 60 * MINUTES
