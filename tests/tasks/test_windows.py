"""Questions and their windows: what fits is read, what cannot be is refused before the tokenizer panics."""

import pytest
from datasets import Dataset

from makd.errors import DataError
from makd.tasks import TaskConfig
from makd.tasks.features import encode_windows

CONTEXT = "The names of a class are a list and a list is read from left to right."


def encoded(tokenizer, question, length=24, stride=4, context=CONTEXT):
    config = TaskConfig(name="squad", path="data", max_length=length, stride=stride)
    rows = {"question": ["What?", question], "context": [context] * 2}
    rows["answers"] = [{"text": ["names"], "answer_start": [4]}] * 2
    return encode_windows(config, Dataset.from_dict(rows), tokenizer)


def question_of(tokenizer, tokens):
    """A question of so many tokens."""
    words = [word for word in sorted(tokenizer.get_vocab()) if word.isalpha() and len(word) > 1]
    question = " ".join(words[:tokens])
    assert len(tokenizer(question, add_special_tokens=False)["input_ids"]) == tokens
    return question


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
