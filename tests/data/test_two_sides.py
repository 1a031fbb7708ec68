"""Prompts with responses as an encoder-decoder reads them: a side each, and nothing of one on the other."""

import copy
import logging

import pytest
import torch
from datasets import Dataset

import makd
from makd.data import Rendering, collator, count_tokens, make_batches, row_lengths, tokenize
from makd.distill import SupervisedTrainer, train
from tests.models import tiny

PAIRS = [("Name a list", "The names of a list"), ("Of what", "a class"), ("The list is long", "It is")]


def rows(*conversations):
    """As `as_conversations` gives them."""
    return Dataset.from_list([
        {"messages": messages, "given": 1, "references": [messages[-1]["content"]]} for messages in conversations
    ])  # fmt: skip


def pairs(found=PAIRS):
    return rows(*([{"role": "user", "content": one}, {"role": "assistant", "content": two}] for one, two in found))


@pytest.fixture(scope="module", params=["t5", "bart"])
def model(request):
    return tiny(request.param, head="seq2seq_lm", vocab_size=300)


def test_the_encoder_reads_the_prompt_and_the_decoder_writes_the_response(model, tokenizer):
    made = tokenize(pairs(), tokenizer, model, 32)
    read = {(tuple(row["input_ids"]), tuple(row["labels"])) for row in made}
    assert read == {(tuple(tokenizer(one)["input_ids"]), tuple(tokenizer(two)["input_ids"])) for one, two in PAIRS}
    assert all(row["attention_mask"] == [1] * len(row["input_ids"]) for row in made)


def test_a_template_stands_around_the_prompt(model, tokenizer):
    rendering = Rendering(template="summary: {prompt} ?")
    (row,) = tokenize(pairs(PAIRS[:1]), tokenizer, model, 32, rendering=rendering)
    assert row["input_ids"] == tokenizer("summary: Name a list ?")["input_ids"]


def test_the_decoder_reads_the_response_a_place_later_and_padding_has_no_label(model, tokenizer):
    made = tokenize(pairs(), tokenizer, model, 32)
    batch = collator(tokenizer, model)(list(made))
    longest = max(len(row["labels"]) for row in made)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (3, longest)
    for line, row in enumerate(made):
        count = len(row["labels"])
        assert batch["labels"][line].tolist() == row["labels"] + [-100] * (longest - count)
        read = [model.config.decoder_start_token_id, *row["labels"][:-1]]
        assert batch["decoder_input_ids"][line, :count].tolist() == read
        assert batch["decoder_attention_mask"][line].tolist() == [1] * count + [0] * (longest - count)
        assert batch["input_ids"][line, : len(row["input_ids"])].tolist() == row["input_ids"]


def test_tokens_are_counted_on_both_sides_when_they_are_read_and_when_they_are_learned_from(model, tokenizer, tmp_path):
    made = tokenize(pairs(), tokenizer, model, 32)
    both = sum(len(row["input_ids"]) + len(row["labels"]) for row in made)
    assert count_tokens(make_batches(made, tokenizer, model, 2)) == both
    settings = makd.TrainingConfig(epochs=1, batch_size=2, evaluate_every=None)
    trainer = SupervisedTrainer(
        copy.deepcopy(model),
        args=settings.to_arguments(tmp_path, 0, True),
        train_dataset=made,
        data_collator=collator(tokenizer, model),
    )
    assert train(trainer, tmp_path, False) == both


def test_the_models_own_loss_is_that_of_the_responses(model, tokenizer):
    made = tokenize(pairs(), tokenizer, model, 32)
    batch = collator(tokenizer, model)(list(made))
    with torch.no_grad():
        loss = model(**batch).loss
        total = count = 0
        for row in made:
            alone = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
            total, count = total + float(alone.loss) * len(row["labels"]), count + len(row["labels"])
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "m2m_100", "blenderbot", "marian", "pegasus"])
def test_a_decoder_reads_what_its_model_would_make_of_the_labels(name, tokenizer):
    model = tiny(name, head="seq2seq_lm", vocab_size=300)
    batch = collator(tokenizer, model)(list(tokenize(pairs(), tokenizer, model, 32)))
    with torch.no_grad():
        own = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")})
        ours = model(**batch)
    real = batch["labels"] != -100
    torch.testing.assert_close(ours.logits[real], own.logits[real], rtol=1e-4, atol=1e-5)
    assert float(ours.loss) == pytest.approx(float(own.loss), rel=1e-5)


def test_each_side_is_cut_and_told_of(model, tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        made = tokenize(pairs(), tokenizer, model, 5, setting="data.max_length")
    assert max(row_lengths(made)) == 5
    assert {len(row["labels"]) for row in made} >= {5}
    cut = sum(any(len(tokenizer(side)["input_ids"]) > 5 for side in pair) for pair in PAIRS)
    assert f"{cut} cut at data.max_length = 5 tokens" in caplog.text


def test_a_row_is_as_long_as_its_longer_side(model, tokenizer):
    made = tokenize(pairs(), tokenizer, model, 32)
    assert row_lengths(made) == [max(len(row["input_ids"]), len(row["labels"])) for row in made]
    assert row_lengths(list(made)) == row_lengths(made)


def test_blank_sides_are_left_out(model, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        made = tokenize(pairs([*PAIRS, ("", "an answer"), ("a prompt", " ")]), tokenizer, model, 32)
    assert len(made) == 3
    assert "1 without a response left out; 1 without a prompt left out" in caplog.text


def test_a_conversation_of_more_turns_is_refused(model, tokenizer):
    turns = [{"role": role, "content": "a list"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(makd.MakdError, match="reads one prompt and writes one response; a conversation has the roles"):
        tokenize(rows(turns), tokenizer, model, 32)


def test_a_system_message_is_refused(model, tokenizer):
    with pytest.raises(makd.MakdError, match=r"data\.system is a message for a chat template"):
        tokenize(pairs(), tokenizer, model, 32, rendering=Rendering(system="Be brief"))


def test_a_model_without_its_head_is_refused(tokenizer):
    with pytest.raises(makd.MakdError, match=r"recipe\.head seq2seq_lm"):
        tokenize(pairs(), tokenizer, tiny("t5", vocab_size=300), 32)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(makd.MakdError):
        tokenize(pairs(), tokenizer, tiny("t5", head="seq2seq_lm", vocab_size=20), 32)
