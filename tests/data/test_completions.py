"""Conversations as tokenized rows: labels, cuts, what is left out and told, and what is refused."""

import pytest
import torch
from datasets import concatenate_datasets

import makd
from makd.data import (
    DataConfig,
    collator,
    completion_of,
    hold_out,
    make_batches,
    prompt_batch,
    prompt_of,
    reference_of,
    tokenize,
)
from tests.data.chats import PLAIN, spell, with_template
from tests.models import tiny


@pytest.fixture
def words(tokenizer):
    return with_template(tokenizer, PLAIN)


@pytest.fixture
def model():
    return tiny("llama", "causal_lm", vocab_size=300)


GOOD = [("a list", "the names of a class"), ("the end", "a class"), ("one name", "the end of the list")]


def test_labels_are_the_answers_tokens_and_nothing_else(words, model):
    for row in tokenize(everything(*GOOD), words, model, 64):
        answer = [label for label in row["labels"] if label != -100]
        assert row["input_ids"][-len(answer) :] == answer == completion_of(row)
        assert row["labels"][: -len(answer)] == [-100] * (len(row["input_ids"]) - len(answer))
        assert answer[-1] == words.sep_token_id


def test_a_batch_has_labels_and_is_padded_on_the_right_whatever_the_tokenizer_does(words, model):
    words.padding_side = "left"
    found = tokenize(everything(*GOOD), words, model, 64)
    batch = collator(words, model)(list(found))
    assert bool(batch["attention_mask"][:, 0].all())
    for line, labels, row in zip(batch["input_ids"], batch["labels"], found, strict=True):
        count = len(row["input_ids"])
        assert line[:count].tolist() == row["input_ids"]
        assert labels.tolist() == row["labels"] + [-100] * (len(labels) - count)


def everything(*pairs):
    """All of the rows, in any order."""
    texts = hold_out([{"prompt": prompt, "response": response} for prompt, response in pairs], DataConfig())
    return concatenate_datasets([texts.train, texts.evaluation])


def test_what_was_read_is_told_in_numbers(words, model, caplog):
    with caplog.at_level("INFO", "makd"):
        found = tokenize(everything(*GOOD), words, model, 64)
    learned = sum(label != -100 for row in found for label in row["labels"])
    tokens = sum(map(len, found["input_ids"]))
    assert caplog.messages[-1] == f"3 of 3 conversations are read: {tokens} tokens, {learned} of them completions"


@pytest.mark.parametrize(
    ("pair", "part"),
    [
        (("a list", " "), "1 without a response left out"),
        (("a list", None), "1 without a response left out"),
        ((" ", "the names"), "1 without a prompt left out"),
        (("the names of a class " * 9, "the end"), "1 left out whose prompt takes all of data.max_length = 32 tokens"),
    ],
    ids=["blank", "null", "no prompt", "long prompt"],
)
def test_rows_that_teach_nothing_are_left_out_and_counted(words, model, caplog, pair, part):
    with caplog.at_level("INFO", "makd"):
        assert len(tokenize(everything(*GOOD, pair), words, model, 32)) == 3
    assert caplog.messages[-1].endswith(f"({part})")
    assert caplog.records[-1].levelname == "WARNING"


def test_an_answer_that_is_cut_is_kept_and_counted(words, model, caplog):
    with caplog.at_level("INFO", "makd"):
        found = tokenize(everything(*GOOD, ("a", "the end of the list " * 9)), words, model, 32)
    assert max(map(len, found["input_ids"])) == 32
    assert caplog.messages[-1].endswith("(1 cut at data.max_length = 32 tokens)")
    assert caplog.records[-1].levelname == "INFO"


@pytest.mark.parametrize(
    ("pairs", "hint"),
    [
        ([("a list", ""), ("the end", " ")], "All 2 rows have a blank response"),
        ([("a list", ""), (" ", "the names")], "All 2 rows have a blank prompt or response"),
        (
            [("a list " * 30, "the end"), ("a name " * 30, "the end"), GOOD[0]],
            "2 of 3 rows have a prompt",
        ),
    ],
    ids=["no responses", "blank", "long prompts"],
)
def test_data_that_teach_nothing_are_refused(words, model, pairs, hint):
    with pytest.raises(makd.MakdError, match=hint):
        tokenize(everything(*pairs), words, model, 32)


def test_models_that_continue_nothing_are_refused(words):
    with pytest.raises(makd.MakdError, match=r"language models answer; BertModel is none"):
        tokenize(everything(*GOOD), words, tiny("bert", vocab_size=300), 32)


def test_the_tokenizer_of_another_model_is_refused(words):
    with pytest.raises(makd.MakdError, match="embeddings for 64 tokens"):
        tokenize(everything(*GOOD), words, tiny("llama", "causal_lm"), 32)


class TestPrompts:
    def test_are_what_stands_before_the_last_answer(self, words, model):
        for row in tokenize(everything(*GOOD), words, model, 64):
            assert prompt_of(row) + completion_of(row) == row["input_ids"]
            assert spell(words, prompt_of(row)).endswith("assistant :")

    def test_give_the_answers_text_back(self, words, model):
        found = tokenize(everything(*GOOD), words, model, 64)
        answers = {reference_of(row, words).replace(" ##", "") for row in found}
        assert answers == {response for _, response in GOOD}

    def test_are_padded_on_the_left(self, words, model):
        found = list(tokenize(everything(*GOOD), words, model, 64))
        batch = prompt_batch(found, words)
        assert bool(batch["attention_mask"][:, -1].all())
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], found, strict=True):
            assert ids[mask.bool()].tolist() == prompt_of(row)

    def test_generation_goes_on_as_from_each_alone(self, words, model):
        found = list(tokenize(everything(*GOOD), words, model, 64))
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        together = model.generate(**prompt_batch(found, words), **settings)[:, -4:]
        alone = [model.generate(**prompt_batch([row], words), **settings)[:, -4:] for row in found]
        assert torch.equal(together, torch.cat(alone))

    def test_of_rows_without_answers_are_refused(self, words, model):
        block = {"input_ids": [1, 2, 3]}
        with pytest.raises(makd.MakdError, match="holds no answer"):
            prompt_of(block)


def test_evaluation_batches_keep_the_labels(words, model):
    batch = make_batches(tokenize(everything(*GOOD), words, model, 64), words, model, batch_size=3, by_length=True)[0]
    assert set(batch) >= {"input_ids", "attention_mask", "labels"}
