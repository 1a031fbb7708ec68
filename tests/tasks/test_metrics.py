"""Official metrics: against scikit-learn and scipy called here, the published scripts' examples, or counted by hand."""

import numpy as np
import pytest
import sklearn.metrics
from scipy import stats

from makd.tasks.answers import answer_f1, best_answer, exact_match, normalise_answer
from makd.tasks.entities import Entity, entities, precision_recall_f1
from makd.tasks.metrics import METRICS, score

GENERATOR = np.random.default_rng(0)
TRUE, PREDICTED = GENERATOR.integers(0, 2, 50), GENERATOR.integers(0, 2, 50)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("accuracy", lambda true, ours: (true == ours).mean()),
        ("f1", sklearn.metrics.f1_score),
        ("matthews", lambda true, ours: np.corrcoef(true, ours)[0, 1]),  # of two classes it is the phi coefficient
        ("macro_f1", lambda true, ours: sklearn.metrics.f1_score(true, ours, average="macro")),
    ],
)
def test_classification_metrics_are_the_official_ones(name, reference):
    assert METRICS["classification"][name](PREDICTED, TRUE) == pytest.approx(reference(TRUE, PREDICTED))


@pytest.mark.parametrize(("name", "reference"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
def test_regression_metrics_are_correlations(name, reference):
    true = GENERATOR.normal(size=30)
    predicted = true + GENERATOR.normal(size=30)
    assert METRICS["regression"][name](predicted, true) == pytest.approx(reference(predicted, true).statistic)


def test_a_constant_prediction_correlates_with_nothing():
    assert METRICS["regression"]["pearson"](np.ones(5), np.arange(5.0)) == 0
    assert METRICS["classification"]["matthews"](np.ones(4, int), np.array([0, 1, 0, 1])) == 0


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Beatles!", "beatles"),
        ("an apple, a day", "apple day"),
        ("Theatre", "theatre"),
        ("a-the", "athe"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_the_squad_script_does(text, plain):
    assert normalise_answer(text) == plain


def test_an_answer_is_compared_with_the_best_of_the_true_ones():
    true = ["Denver Broncos", "The Denver Broncos", "Broncos of Denver"]
    assert exact_match("denver broncos.", true) == 1
    assert exact_match("Broncos", true) == 0
    assert answer_f1("the Broncos", true) == pytest.approx(2 * 1 * 0.5 / 1.5)  # precision 1, recall 1/2
    assert answer_f1("nothing here", true) == 0


@pytest.mark.parametrize(
    ("predicted", "true", "exact", "f1"),
    [
        ("「北京」。", "北京", 1, 1),
        ("北京市", "北京", 0, 0.8),
        ("القاهرة،", "القاهرة", 1, 1),
        ("दिल्ली।", "दिल्ली", 1, 1),
        ("Đa\u0323t", "Đạt", 1, 1),
        ("东京", "北京", 0, 0.5),
    ],
)
def test_answers_in_other_scripts_are_compared_by_words_of_theirs(predicted, true, exact, f1):
    metrics = METRICS["question_answering"]
    assert metrics["exact_match"]([predicted], [[true]]) == exact
    assert metrics["f1"]([predicted], [[true]]) == pytest.approx(f1)


def test_english_answers_are_squads_though_one_has_an_accent_or_none_has_letters():
    metrics, true = METRICS["question_answering"], [["The Łódź"]] + [["the cat"]] * 20 + [["10%"]] + [[]]
    predicted = ["łódź.", *["a cat"] * 20, "10", ""]
    assert metrics["exact_match"](predicted, true) == metrics["f1"](predicted, true) == 1


def test_no_answer_is_right_only_where_there_is_none():
    assert exact_match("", []) == answer_f1("", []) == 1
    assert answer_f1("something", []) == answer_f1("", ["something"]) == 0


@pytest.mark.parametrize(
    ("true", "says_nothing"), [(["interventionism", "."], 0), ([".", "the"], 1)], ids=["one with words", "none"]
)
def test_true_answers_without_words_count_only_where_there_is_no_other(true, says_nothing):
    # SQuAD 2.0's script; the F1 of 1.1's, which has no such rule, is the same where one answer has words
    assert exact_match("", true) == answer_f1("", true) == says_nothing
    assert exact_match("a", true) == answer_f1("a", true) == says_nothing
    assert answer_f1("interventionism", true) == 1 - says_nothing


def test_questions_with_and_without_answer_are_told_apart():
    metrics = METRICS["question_answering"]
    predicted, true = ["cat", "", "dog"], [["cat"], [], []]
    assert metrics["exact_match"](predicted, true) == pytest.approx(2 / 3)
    assert metrics["answerable_f1"](predicted, true) == 1
    assert metrics["unanswerable_f1"](predicted, true) == pytest.approx(1 / 2)


def window(offsets):
    return {"offsets": offsets, "first": 0}


def test_the_best_answer_begins_before_it_ends_and_stands_in_the_context():
    offsets = [[-1, -1], [-1, -1], [0, 3], [4, 7], [8, 11]]  # [CLS] question one two six
    start, end = np.array([9.0, 9, 0, 5, 1]), np.array([9.0, 9, 6, 0, 3])
    assert best_answer("one two six", [window(offsets)], [start], [end], 30, False) == "two six"  # 5 + 3, not 5 + 6
    assert best_answer("one two six", [window(offsets)], [start], [end], 30, True) == ""  # [CLS]: 18 > 8


def test_the_best_answer_is_that_of_the_best_window():
    windows = [window([[-1, -1], [0, 3]]), window([[-1, -1], [4, 7]])]
    starts, ends = [np.array([0.0, 1]), np.array([5.0, 3])], [np.array([0.0, 1]), np.array([5.0, 3])]
    assert best_answer("one two", windows, starts, ends, 30, False) == "two"
    assert best_answer("one two", windows, starts, ends, 30, True) == "two"  # the first window's [CLS] is least likely


def test_the_best_answer_has_as_many_tokens_as_are_asked_for():
    offsets = [[-1, -1], [0, 3], [4, 7], [8, 11]]
    start, end = np.array([0.0, 9, 0, 0]), np.array([0.0, 0, 3, 9])
    found = [best_answer("one two six", [window(offsets)], [start], [end], longest, False) for longest in (3, 2)]
    assert found == ["one two six", "one two"]


@pytest.mark.parametrize("text", ["Cafe\u0301", "Z\u0323\u0302", "\u0915\u094d\u200d"])
def test_the_best_answer_has_the_marks_of_its_last_letter(text):
    # an uncased WordPiece drops accents: no token's offsets have them
    offsets, scores = [[-1, -1], [0, len(text) - (2 if text[0] != "C" else 1)]], np.array([0.0, 1])
    assert best_answer(f"{text} is", [window(offsets)], [scores], [scores], 30, False) == text


# seqeval's README: f1 0.50, and the per-type counts that go with it
TAGS = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
GUESS = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


def test_entity_f1_is_that_of_seqevals_published_example():
    assert METRICS["token_classification"]["entity_f1"](GUESS, TAGS) == pytest.approx(0.50)
    assert METRICS["token_classification"]["token_accuracy"](GUESS, TAGS) == pytest.approx(0.80)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (["B-A", "B-A"], {("A", 0, 0), ("A", 1, 1)}),
        (["O", "I-A", "I-A"], {("A", 1, 2)}),
        (["I-A", "I-B"], {("A", 0, 0), ("B", 1, 1)}),
        (["B-A", "I-B", "E-B"], {("A", 0, 0), ("B", 1, 2)}),
        (["S-A", "I-A", "O"], {("A", 0, 0), ("A", 1, 1)}),
        (["B-per-son", "I-per-son"], {("per-son", 0, 1)}),
        (["O"], set()),
    ],
)
def test_entities_are_found_as_conlleval_finds_them(tags, found):
    assert entities([tags]) == {Entity(0, *place) for place in found}


def test_entities_of_two_rows_do_not_touch():
    assert len(entities([["B-A"], ["I-A"]])) == 2


def test_without_entities_precision_and_recall_are_zero():
    assert precision_recall_f1(set(), set()) == (0, 0, 0)


def test_the_score_is_the_mean_but_for_answers_and_entities():
    assert score("classification", {"accuracy": 0.8, "f1": 0.6}) == pytest.approx(0.7)
    assert score("question_answering", {"f1": 0.8, "exact_match": 0.6}) == 0.8
    assert score("token_classification", {"token_accuracy": 0.9}) == 0.9
