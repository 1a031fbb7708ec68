"""What fits into rows and windows of a task is read; what cannot be is refused before the tokenizer panics."""

import copy
import logging

import pytest
from datasets import Dataset
from tokenizers import normalizers

import makd
from makd.errors import DataError
from makd.tasks import TaskConfig, read_task, tokenize_task
from makd.tasks.features import NOWHERE, encode_windows
from makd.tasks.rows import TaskRows
from tests.models import tiny

CONTEXT = "The names of a class are a list and a list is read from left to right."


def encoded(tokenizer, question, length=24, stride=4, context=CONTEXT):
    config = TaskConfig(name="squad", path="data", max_length=length, stride=stride)
    rows = {"question": ["What?", question], "context": [context] * 2}
    rows["answers"] = [{"text": ["names"], "answer_start": [4]}] * 2
    return encode_windows(config, Dataset.from_dict(rows), tokenizer)


def pairs(length):
    """Rows of two texts, longer than any row may be."""
    config = TaskConfig(name="glue/mrpc", path="data", max_length=length)
    rows = Dataset.from_dict({"text": [CONTEXT * 3] * 4, "text_pair": [CONTEXT * 3] * 4, "label": [0, 1, 0, 1]})
    return TaskRows(config, ("not_equivalent", "equivalent"), rows, {"validation": rows}, None)


def question_of(tokenizer, tokens):
    """A question of so many tokens."""
    words = [word for word in sorted(tokenizer.get_vocab()) if word.isalpha() and len(word) > 1]
    question = " ".join(words[:tokens])
    assert len(tokenizer(question, add_special_tokens=False)["input_ids"]) == tokens
    return question


@pytest.fixture
def dropping(tokenizer):
    """A tokenizer that drops control characters and such, as BERT's do."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    return tokenizer


def spans(tokenizer, context, answer, begin, length=24, stride=4, **settings):
    """What each window of a context teaches as the answer; None where it teaches nothing."""
    config = TaskConfig(name="squad", path="data", max_length=length, stride=stride, **settings)
    rows = {"question": ["What?"], "context": [context], "answers": [{"text": [answer], "answer_start": [begin]}]}
    found = encode_windows(config, Dataset.from_dict(rows), tokenizer)
    return [
        None
        if row["start_positions"] == NOWHERE
        else tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]).replace(" ##", "")
        for row in found
    ]


@pytest.mark.parametrize(
    ("before", "answer", "after"),
    [
        ("is a ", "list\n", ""),
        ("is a ", "list \u200b", ""),
        ("", "  list", " is a"),
        ("is a ", "list ", "of names"),
    ],
)
def test_what_no_token_stands_for_at_an_answers_ends_is_not_missed(dropping, before, answer, after):
    assert spans(dropping, before + answer + after, answer, len(before)) == ["list"]


def test_an_answer_that_is_in_no_window_whole_is_not_taught_as_none_and_told(dropping, caplog):
    with caplog.at_level(logging.WARNING, logger="makd"):
        assert set(spans(dropping, CONTEXT, CONTEXT, 0, length=16)) == {None}
        assert spans(dropping, "A \u200b list", "\u200b", 2) == [None]
    assert caplog.text.count("1 of 1 answers are in no window of task.max_length") == 2


def test_answers_that_are_too_long_to_be_predicted_are_told(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="makd"):
        spans(tokenizer, CONTEXT, CONTEXT[:20], 0, length=60, longest_answer=3)
    assert "1 of 1 answers have more than task.longest_answer = 3 tokens" in caplog.text
    caplog.clear()
    spans(tokenizer, CONTEXT, CONTEXT[:20], 0, length=60)
    assert not caplog.text


@pytest.mark.parametrize("tokens", [17, 20, 21, 22, 24, 40])  # of 24, 3 are marks: 21 are left, 4 of them overlap
def test_a_question_that_leaves_no_room_for_its_context_is_refused_with_its_row(tokenizer, tokens):
    with pytest.raises(DataError, match=rf"question of row 1 has {tokens} tokens .* leaves {max(0, 21 - tokens)} to"):
        encoded(tokenizer, question_of(tokenizer, tokens))


def test_the_longest_question_that_leaves_room_is_read_in_windows_that_move_by_a_token(tokenizer):
    found = encoded(tokenizer, question_of(tokenizer, 16))
    size = len(tokenizer(CONTEXT, add_special_tokens=False)["input_ids"])
    assert sum(number == 1 for number in found["question"]) == size - 4  # 5 of the context in each, 1 of them new


def test_a_long_question_whose_context_fits_is_read(tokenizer):
    found = encoded(tokenizer, question_of(tokenizer, 17), context="The")
    assert list(found["question"]) == [0, 1]


def test_a_tasks_rows_are_no_longer_than_robertas_positions(tokenizer):
    model = tiny("roberta", "sequence_classification", vocab_size=300)
    with pytest.raises(DataError, match=r"task\.max_length is 64 tokens, but RobertaForSequ\w+ has positions for 63"):
        tokenize_task(pairs(64), tokenizer, model)
    task = tokenize_task(pairs(63), tokenizer, model)
    assert max(map(len, task.held_out["input_ids"])) == 63
    assert set(task.evaluate(model)) == {"accuracy", "f1", "score"}


def test_token_types_that_a_model_has_no_embedding_for_are_refused_before_its_forward(tokenizer):
    typed = copy.deepcopy(tokenizer)
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model = tiny("roberta", "sequence_classification", vocab_size=300, type_vocab_size=1)
    with pytest.raises(DataError, match="token type 1, but RobertaForSequenceClassification knows 1"):
        tokenize_task(pairs(32), typed, model)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"text_columns": ("a", "a")}, r"task\.text_columns is 1 or 2 of classification, each another column"),
        ({"held_out": 0.999}, r"task\.held_out = 0\.999 of 4 rows are all of them"),
    ],
)
def test_settings_that_leave_nothing_to_read_or_to_train_on_are_refused(tmp_path, settings, told):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\nsome text,0\nmore text,1\nsome text,0\nmore text,1\n", encoding="utf-8")
    settings = {"text_columns": ("a",), "label_column": "b", **settings}
    with pytest.raises(makd.MakdError, match=told):
        read_task(TaskConfig(name="classification", path=str(path), **settings))
