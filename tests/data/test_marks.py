"""What tokenizers put around texts, in rows and blocks; and what room it leaves."""

import copy
import math
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

import makd
from makd.data import make_batches, tokenize
from makd.data.marks import Marks, find_marks
from makd.errors import DataError
from makd.evaluation import perplexity
from makd.loading import load_model, load_tokenizer
from tests.models import tiny

BEGIN, END = 2, 3
"""[CLS] and [SEP] of the tests' tokenizer; [SEP] is its end-of-text."""
TEXTS = ["The names of a class.", "A list", "Sequences are read from left to right, one name after the other."]


def marking(tokenizer, template):
    """A copy of `tokenizer` that puts around a text what `template` says."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", BEGIN), ("[SEP]", END)]
    )
    return tokenizer


def blocks(tokenizer, length, texts=TEXTS):
    """Blocks in the order of the text."""
    model = tiny("llama", "causal_lm", vocab_size=300)
    found = tokenize(Dataset.from_dict({"text": texts}), tokenizer, model, length)["input_ids"]
    return sorted(map(list, found))


def words(tokenizer):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(
    ("template", "marks"),
    [("$A", ((), ())), ("[CLS] $A", ((2,), ())), ("$A [SEP]", ((), (3,))), ("[CLS] $A [SEP]", ((2,), (3,)))],
)
def test_marks_are_found_on_both_sides(tokenizer, template, marks):
    assert find_marks(marking(tokenizer, template)) == Marks(*marks)


def test_finding_marks_leaves_the_tokenizer_as_it_is(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.enable_truncation(5)
    find_marks(own)
    assert own.backend_tokenizer.truncation["max_length"] == 5


@pytest.fixture
def chinese():
    """A tokenizer of two Chinese letters, with a begin-of-text and none for what it does not know; and a model."""
    words = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "中": 2, "国": 3}, []))
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def test_marks_are_found_though_the_tokenizer_knows_no_latin_letter(chinese):
    assert find_marks(chinese) == Marks((0,), (1,))
    assert blocks(chinese, 4, ["中国", "国中"]) == [[0, 2, 3, 1], [0, 3, 2, 1]]


def test_a_tokenizer_that_reads_every_text_as_nothing_is_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"<s>": 0}, [])), bos_token="<s>")
    with pytest.raises(DataError, match="no token for 'a text', nor for what its own 0 tokens stand for"):
        find_marks(words)


def test_without_marks_end_of_text_stands_after_each_text_and_blocks_join_to_them(tokenizer):
    joined = [token for ids in words(tokenizer) for token in [*ids, END]]
    expected = [joined[start : start + 4] for start in range(0, len(joined) - 3, 4)]
    assert blocks(marking(tokenizer, "$A"), 4) == sorted(expected)


def test_each_text_and_each_block_begins_with_the_begin_of_text(tokenizer):
    joined = [token for ids in words(tokenizer) for token in [BEGIN, *ids]]
    found = blocks(marking(tokenizer, "[CLS] $A"), 8)
    expected, rest = [], joined
    while True:
        block = rest[:8] if rest[0] == BEGIN else [BEGIN, *rest[:7]]
        if len(block) < 8:
            break
        expected.append(block)
        rest = rest[8:] if rest[0] == BEGIN else rest[7:]
    assert found == sorted(expected)
    assert all(block[0] == BEGIN and block[:2] != [BEGIN, BEGIN] for block in found)


def test_a_tokenizer_that_ends_texts_itself_gets_no_second_end(tokenizer):
    found = blocks(marking(tokenizer, "$A [SEP]"), sum(map(len, words(tokenizer))) + 3)
    assert found == [[token for ids in words(tokenizer) for token in [*ids, END]]]


def test_a_text_that_holds_its_begin_of_text_gets_no_second_one(tokenizer):
    marked = marking(tokenizer, "[CLS] $A")
    assert blocks(marked, 4, ["[CLS] " + text for text in TEXTS]) == blocks(marked, 4)


def test_what_a_model_is_given_in_use_is_no_target_but_a_mark_that_also_ends_texts_is(tokenizer):
    model = tiny("llama", "causal_lm", vocab_size=300)
    rows = Dataset.from_dict({"text": TEXTS})
    for template, hidden in (("[CLS] $A", True), ("[SEP] $A", False)):  # the second is OPT's way
        own = marking(tokenizer, template)
        batch = make_batches(tokenize(rows, own, model, 24), own, model, batch_size=8)[0]
        mark = BEGIN if hidden else END
        inside = batch["input_ids"][:, 1:] == mark
        assert inside.any()
        assert (batch["labels"][:, 1:][inside] == (-100 if hidden else mark)).all()


def log_likelihood(model, ids):
    """Of all tokens but the first, and how many they are: what lm-eval sums up of a text."""
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[place, token]) for place, token in enumerate(ids[1:])), len(ids) - 1


def test_perplexity_is_that_of_the_texts_after_their_begin_of_text(tokenizer):
    own, model = marking(tokenizer, "[CLS] $A"), tiny("llama", "causal_lm", vocab_size=300)
    single = [word for word in sorted(own.get_vocab()) if len(word) > 1 and word.isalpha()]
    texts = [" ".join(single[:7]), " ".join(single[7:14])]  # with the mark a block each
    rows = tokenize(Dataset.from_dict({"text": texts}), own, model, 8)
    total, count = map(sum, zip(*(log_likelihood(model, own(text)["input_ids"]) for text in texts), strict=True))
    assert perplexity(model, make_batches(rows, own, model, 2)) == pytest.approx(math.exp(-total / count), rel=1e-5)


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high. Lily's mom said, \"Lily, let's go to the park.\" "
    "Lily was sad and didn't know what to do."
)


@pytest.mark.skipif("MAKD_MODELS" not in os.environ, reason="MAKD_MODELS (folder of small real models) is not set")
def test_a_real_llamas_perplexity_on_stories_is_what_lm_eval_sums_up():
    folder = str(Path(os.environ["MAKD_MODELS"]) / "stories260K")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = tokenizer(STORY)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    total, count = log_likelihood(model, ids)
    rows = tokenize(Dataset.from_dict({"text": [STORY] * 4}), tokenizer, model, len(ids))
    assert len(rows) == 4
    found = perplexity(model, make_batches(rows, tokenizer, model, 2))
    assert found == pytest.approx(math.exp(-total / count), rel=1e-4)
    assert found < 3  # 1.94 a token on stories is what its makers' check gives


@pytest.mark.parametrize(
    ("name", "head", "length", "columns", "told"),
    [
        ("bert", "base", 2, ("text",), "puts 2 of its own into each row, which leaves 0 for a text; raise it to 3"),
        ("bert", "base", 4, ("text", "text_pair"), "puts 3 of its own .* leaves 1 for two texts; raise it to 5"),
        ("roberta", "base", 64, ("text",), "64 tokens, but RobertaModel has positions for 63; lower it to 63"),
        ("llama", "causal_lm", 2, ("text",), "leaves 0 for a text"),
        ("t5", "base", 2, ("text",), "leaves 0 for a text"),
    ],
)
def test_a_length_without_room_for_text_is_refused(tokenizer, name, head, length, columns, told):
    rows = Dataset.from_dict(dict.fromkeys(columns, TEXTS))
    with pytest.raises(makd.MakdError, match=rf"data\.max_length is .*{told}"):
        tokenize(rows, tokenizer, tiny(name, head, vocab_size=300), length)


def test_as_many_tokens_as_fit_behind_robertas_padding_are_read(tokenizer):
    model = tiny("roberta", vocab_size=300)
    rows = tokenize(Dataset.from_dict({"text": [" ".join(TEXTS * 4)]}), tokenizer, model, 63)
    batch = make_batches(rows, tokenizer, model, 1)[0]
    assert batch["input_ids"].shape == (1, 63)
    assert torch.isfinite(model(**batch).last_hidden_state).all()
    with pytest.raises(RuntimeError):
        model(torch.full((1, 64), 5))


def test_token_types_that_a_model_has_no_embedding_for_are_refused(tokenizer):
    typed = copy.deepcopy(tokenizer)
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model = tiny("roberta", vocab_size=300, type_vocab_size=1)
    pairs = Dataset.from_dict({"text": TEXTS, "text_pair": TEXTS})
    with pytest.raises(makd.MakdError, match=r"token type 1, but RobertaModel knows 1 \(type_vocab_size\), from 0"):
        tokenize(pairs, typed, model, 32)
    assert len(tokenize(pairs, tokenizer, model, 32)) == 3  # without types, as RoBERTa's own reads pairs
