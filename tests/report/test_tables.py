"""Tables of a run's measurements."""

import pytest

from makd.report.tables import metrics_markdown


def measured(training, before, after):
    return {
        "params": {key: {"teacher": 100, "student": 50} for key in ("total", "linears")},
        "tokens": {"training": training},
        "fidelity": {"before": {"cosine": before}, "after": {"cosine": after}},
    }


@pytest.mark.parametrize(
    ("metrics", "last"),
    [
        (measured(0, 0.9, 0.9), "| cosine to teacher |  | 0.9000 |"),
        (measured(10, 0.9, 0.9), "| cosine to teacher |  | 0.9000 | 0.9000 |"),
        (measured(0, 0.8, 0.9), "| cosine to teacher |  | 0.8000 | 0.9000 |"),
    ],
    ids=["not trained", "trained to no avail", "taught layer by layer"],
)
def test_there_is_a_column_from_before_the_training_where_there_was_one(metrics, last):
    assert metrics_markdown(metrics).splitlines()[-1] == last
