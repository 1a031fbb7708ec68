"""Plain text for causal language models, each text on its own."""

import pytest
from datasets import Dataset

import makd
from makd.data import DataConfig, Rendering, collator, make_batches, tokenize
from makd.data.conversations import MESSAGES
from makd.evaluation import perplexity
from tests.data.chats import chat
from tests.data.test_marks import marking
from tests.models import tiny

TEXTS = ["The names of a class.", "A list", "Sequences are read from left to right, one name after the other."]
APART = Rendering(documents="apart")


@pytest.fixture
def model():
    return tiny("llama", "causal_lm", vocab_size=300)


def read(texts, tokenizer, model, length=64, rendering=APART):
    return tokenize(Dataset.from_dict({"text": texts}), tokenizer, model, length, rendering=rendering)


def test_each_text_is_a_row_with_the_marks_around_it(tokenizer, model):
    found = read(TEXTS, tokenizer, model)
    assert sorted(found["input_ids"]) == sorted(tokenizer(TEXTS)["input_ids"])


def test_a_text_that_is_longer_is_cut(tokenizer, model, caplog):
    with caplog.at_level("INFO", "makd"):
        found = read(TEXTS, tokenizer, model, 8)
    assert sorted(found["input_ids"]) == sorted(ids[:8] for ids in tokenizer(TEXTS)["input_ids"])
    longer = sum(len(ids) > 8 for ids in tokenizer(TEXTS)["input_ids"])
    assert f"({longer} cut at data.max_length = 8 tokens, 0 of one token left out)" in caplog.messages[-1]


def test_together_in_a_batch_they_are_predicted_as_each_alone(tokenizer, model):
    found = read(TEXTS, tokenizer, model)
    together = make_batches(found, tokenizer, model, batch_size=3)
    alone = make_batches(found, tokenizer, model, batch_size=1)
    assert perplexity(model, together) == pytest.approx(perplexity(model, alone), rel=1e-5)


def test_padding_is_no_target(tokenizer, model):
    batch = collator(tokenizer, model)(list(read(TEXTS, tokenizer, model)))
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())


def test_a_tokenizer_that_marks_nothing_ends_each_text(tokenizer, model):
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    found = read(TEXTS, marking(tokenizer, "$A"), model)
    assert sorted(found["input_ids"]) == sorted([*ids, tokenizer.eos_token_id] for ids in plain)


def test_texts_that_leave_nothing_to_predict_are_left_out_and_counted(tokenizer, model, caplog):
    unmarked = marking(tokenizer, "$A")
    unmarked.eos_token = None
    with caplog.at_level("INFO", "makd"):
        assert len(read([*TEXTS, "a"], unmarked, model)) == 3
    assert "3 of 4 texts are read" in caplog.messages[-1]
    assert "1 of one token left out" in caplog.messages[-1]
    with pytest.raises(makd.MakdError, match="None of 2 texts has a token to predict"):
        read(["a", "a"], unmarked, model)


def test_the_setting_is_one_of_the_data():
    assert DataConfig(documents="apart").rendering == APART


def test_documents_that_are_never_joined_are_not_to_be_kept_apart(tokenizer, model):
    conversations = Dataset.from_dict({MESSAGES: [chat("a list", "the names")]})
    unmarked = Rendering(documents="apart", template="none")
    with pytest.raises(makd.MakdError, match=r"data\.documents is apart, .* conversations are a row each"):
        tokenize(conversations, tokenizer, model, 64, rendering=unmarked)
    for name in ("bert", "t5"):
        with pytest.raises(makd.MakdError, match="Model reads a row of each text in any case"):
            read(TEXTS, tokenizer, tiny(name, vocab_size=300))
