"""Tables of a run's measurements."""

import pytest

from makd.run_folder.tables import metrics_markdown


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


def test_bits_a_byte_are_told_as_finely_as_students_differ_in_them():
    sides = {"teacher": 0.9149, "before": 0.9051, "after": 0.9147}
    rolling = {when: {"token": 6.0, "word": 18.0, "bits_per_byte": bits} for when, bits in sides.items()}
    lines = metrics_markdown({**measured(10, 0.9, 0.9), "rolling_perplexity": rolling}).splitlines()
    assert "| rolling bits a byte | 0.9149 | 0.9051 | 0.9147 |" in lines
    assert "| rolling perplexity | 6.00 | 6.00 | 6.00 |" in lines
