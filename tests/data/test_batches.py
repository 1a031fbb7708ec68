"""From texts to token batches: rows for encoders, blocks for decoders, both sides for encoder-decoders."""

import copy

import pytest
import torch
from datasets import Dataset

import makd
from makd.data import calibration_batches, collator, make_batches, tokenize
from tests.models import GEMMA2, tiny

TEXTS = ["The names of a class.", "A list", "Sequences are read from left to right, one name after the other."]


def rows(**columns):
    return Dataset.from_dict({"text": TEXTS, **columns})


def test_an_encoder_reads_a_row_at_a_time_cut_at_max_length(tokenizer):
    found = tokenize(rows(), tokenizer, tiny("bert", vocab_size=300), 8)
    lengths = {len(ids) for ids in found["input_ids"]}
    assert len(found) == 3
    assert max(lengths) == 8 > min(lengths)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {"vocab_size": 300}), ("gemma3_images", {"text_config": {**GEMMA2, "vocab_size": 300}})],
)
def test_a_block_predicts_its_own_tokens(name, settings, tokenizer):
    model = tiny(name, "causal_lm", **settings)
    batch = make_batches(tokenize(rows(), tokenizer, model, 4), tokenizer, model, batch_size=2)[0]
    begins = batch["input_ids"] == tokenizer.cls_token_id  # what it is given in use
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(begins, -100))


def test_an_encoder_decoder_reads_the_row_on_both_sides(tokenizer):
    model = tiny("t5", vocab_size=300)
    batch = make_batches(tokenize(rows(), tokenizer, model, 8), tokenizer, model, batch_size=3)[0]
    assert torch.equal(batch["decoder_input_ids"], batch["input_ids"])
    assert torch.equal(batch["decoder_attention_mask"], batch["attention_mask"])


def test_pairs_are_told_apart_by_token_types(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
    model = tiny("bert", vocab_size=300)
    found = tokenize(rows(text_pair=TEXTS[::-1]), tokenizer, model, 64)
    assert all(set(types) == {0, 1} for types in found["token_type_ids"])
    assert "text_pair" not in found.column_names


def test_a_text_that_is_not_there_is_an_empty_one(tokenizer):
    model = tiny("bert", vocab_size=300)
    found = tokenize(rows(text_pair=[None] * len(TEXTS)), tokenizer, model, 64)
    assert found["input_ids"] == tokenize(rows(text_pair=[""] * len(TEXTS)), tokenizer, model, 64)["input_ids"]


@pytest.mark.parametrize(("labels", "dtype"), [([0, 2, 1], torch.int64), ([0.5, 4.8, 1.0], torch.float32)])
def test_labels_are_classes_or_numbers(tokenizer, labels, dtype):
    model = tiny("bert", "sequence_classification", vocab_size=300)
    encoded = tokenize(rows(label=labels), tokenizer, model, 8)
    batch = collator(tokenizer, model)(list(encoded))
    assert batch["labels"].dtype == dtype
    assert sorted(batch["labels"].tolist()) == pytest.approx(sorted(labels))


def test_sorted_by_length_there_is_no_more_padding_than_needed(tokenizer):
    model = tiny("bert", vocab_size=300)
    batches = make_batches(tokenize(rows(), tokenizer, model, 64), tokenizer, model, batch_size=1, by_length=True)
    sizes = [batch["input_ids"].shape[1] for batch in batches]
    assert sizes == sorted(sizes)
    assert all(bool(batch["attention_mask"].all()) for batch in batches)


def test_texts_shorter_than_a_block_are_refused(tokenizer):
    model = tiny("llama", "causal_lm", vocab_size=300)
    with pytest.raises(makd.MakdError, match=r"fewer than one block of data\.max_length = 64"):
        tokenize(rows(), tokenizer, model, 64)


@pytest.mark.parametrize(("name", "head"), [("bert", "base"), ("llama", "causal_lm")])
def test_the_tokenizer_of_another_model_is_refused(tokenizer, name, head):
    with pytest.raises(makd.MakdError, match="embeddings for 64 tokens"):
        tokenize(rows(), tokenizer, tiny(name, head), 4)


def test_a_decoder_reads_one_column(tokenizer):
    with pytest.raises(makd.MakdError, match=r"names two columns, and LlamaForCausalLM reads one text\. Name a prompt"):
        tokenize(rows(text_pair=TEXTS), tokenizer, tiny("llama", "causal_lm", vocab_size=300), 4)


def test_rows_that_are_cut_are_counted(tokenizer, caplog):
    whole = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    middle = sorted(whole)[1]
    with caplog.at_level("INFO", "makd"):
        tokenize(rows(), tokenizer, tiny("bert", vocab_size=300), middle)
    assert caplog.messages == [f"1 of 3 rows are longer than data.max_length = {middle} tokens: cut there"]


def test_where_no_row_is_cut_nothing_is_said(tokenizer, caplog):
    with caplog.at_level("INFO", "makd"):
        tokenize(rows(), tokenizer, tiny("bert", vocab_size=300), 64)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_rows_are_padded_on_the_right_whatever_the_tokenizer_does(tokenizer, name):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    rows = [{"input_ids": [7] * length, "labels": [5] * length} for length in (2, 4)]
    batch = collator(tokenizer, tiny(name, "token_classification" if name == "bert" else "causal_lm"))(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[5, 5, -100, -100], [5, 5, 5, 5]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_places_of_answers_are_those_in_the_padded_row(tokenizer, side):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    places = [(6, 2, 4), (3, 1, 2), (4, -1, -1)]
    rows = [
        {
            "input_ids": [*range(10, 10 + length)],
            "attention_mask": [1] * length,
            "start_positions": a,
            "end_positions": z,
        }
        for length, a, z in places
    ]
    batch = collator(tokenizer, tiny("bert", "question_answering"))(rows)
    found = zip(batch["start_positions"].tolist(), batch["end_positions"].tolist(), strict=True)
    for line, (_, a, z), (start, end) in zip(batch["input_ids"].tolist(), places, found, strict=True):
        if a < 0:
            assert (start, end) == (-1, -1)
        else:
            assert line[start : end + 1] == [*range(10 + a, 10 + z + 1)]


def test_calibration_batches_are_of_some_rows_and_know_the_tokens_of_all(tokenizer):
    model = tiny("bert", vocab_size=300)
    found = tokenize(rows(), tokenizer, model, 64)
    batches = calibration_batches(found, tokenizer, model, batch_size=1, limit=2)
    expected = torch.bincount(torch.tensor([token for ids in found["input_ids"] for token in ids]))
    assert len(batches) == 2
    assert torch.equal(batches.token_counts, expected)
