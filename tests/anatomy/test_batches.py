"""Batches of the user's own: what is refused, and how what is given on stands in its rows."""

import pytest
import torch

import makd
from makd.anatomy.batches import check_batches
from makd.errors import DataError
from tests.models import batch, tiny

TEXTS = ([11, 12, 13, 14, 15, 16, 17], [21, 22, 23], [31, 32, 33, 34])


def padded(side, padding=0, texts=TEXTS):
    width = max(map(len, texts))
    rows = {"input_ids": [], "attention_mask": []}
    for text in texts:
        more = width - len(text)
        before, behind = (more, 0) if side == "left" else (0, more)
        rows["input_ids"].append([padding] * before + text + [padding] * behind)
        rows["attention_mask"].append([0] * before + [1] * len(text) + [0] * behind)
    return {name: torch.tensor(value) for name, value in rows.items()}


def passed(given, model):
    return next(iter(check_batches([given], model)))


class TestPaddingOnTheLeft:
    @pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bloom"])
    def test_the_perplexity_is_that_of_each_text_alone(self, name):
        model = tiny(name, "causal_lm")
        alone = [{"input_ids": torch.tensor([text])} for text in TEXTS]
        assert makd.perplexity(model, [padded("left")]) == pytest.approx(makd.perplexity(model, alone), rel=1e-4)

    @pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
    def test_a_student_is_made_of_what_each_text_is_alone(self, name):
        model = tiny(name)
        students = [
            makd.factorize(
                model, makd.Budget(keep_linears=0.5), calibration=[padded(side, model.config.pad_token_id or 0)]
            )
            for side in ("left", "right")
        ]
        assert makd.fingerprint(students[0]) == makd.fingerprint(students[1])

    def test_all_that_has_an_entry_for_each_token_stands_with_its_token(self):
        given = padded("left")
        given["labels"] = torch.where(given["attention_mask"] == 1, given["input_ids"] + 1, -100)
        given["token_type_ids"] = given["input_ids"] % 2
        found, wanted = passed(given, tiny("bert")), padded("right")
        assert torch.equal(found["input_ids"], wanted["input_ids"])
        assert torch.equal(found["attention_mask"], wanted["attention_mask"])
        assert torch.equal(found["labels"] == -100, wanted["attention_mask"] == 0)
        assert torch.equal(found["token_type_ids"], wanted["input_ids"] % 2)

    def test_places_of_answers_are_those_of_the_same_tokens(self):
        given = padded("left") | {"start_positions": torch.tensor([1, 5, -1])}
        assert passed(given, tiny("bert"))["start_positions"].tolist() == [1, 1, -1]

    def test_numbers_of_a_whole_row_stay_where_they_are(self):
        numbers = torch.rand(3, 7)
        assert torch.equal(passed(padded("left") | {"labels": numbers}, tiny("bert"))["labels"], numbers)

    def test_labels_of_an_encoder_decoder_are_the_decoders(self):
        labels = torch.arange(21).reshape(3, 7)
        assert torch.equal(passed(padded("left") | {"labels": labels}, tiny("t5", "seq2seq_lm"))["labels"], labels)

    def test_what_a_decoder_reads_is_moved_by_its_own_mask(self):
        decoder = {f"decoder_{name}": value for name, value in padded("left").items()}
        found = passed(padded("right") | decoder, tiny("bart"))
        for name, value in padded("right").items():
            assert torch.equal(found[name], value)
            assert torch.equal(found[f"decoder_{name}"], value)

    def test_where_positions_are_given_nothing_is_moved(self):
        given = padded("left")
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert torch.equal(passed(given, tiny("gpt2"))["input_ids"], given["input_ids"])

    def test_the_users_own_batch_is_as_it_was(self):
        given, before = padded("left"), padded("left")
        passed(given, tiny("gpt2"))
        assert all(torch.equal(given[name], value) for name, value in before.items())


class TestPaddingThatNoMaskMarks:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_is_refused(self, side):
        model = tiny("gpt2", "causal_lm", pad_token_id=9)
        with pytest.raises(DataError, match="3 or more of the padding token, 9, which would count as text"):
            makd.perplexity(model, [{"input_ids": padded(side, 9)["input_ids"]}])

    def test_is_refused_of_a_decoder(self):
        given = padded("right") | {"decoder_input_ids": padded("right")["input_ids"]}
        with pytest.raises(DataError, match="decoder_input_ids of a batch"):
            passed(given, tiny("t5"))

    @pytest.mark.parametrize("ends", [[9], [9, 9]])
    def test_a_text_may_end_with_the_token_that_is_padding_too(self, ends):
        model = tiny("gpt2", "causal_lm", pad_token_id=9, eos_token_id=9)
        makd.perplexity(model, [{"input_ids": torch.tensor([[9, 11, 12, *ends]])}])

    def test_a_mask_of_ones_says_that_it_is_text(self):
        ids = torch.tensor([[11, 12, 9, 9, 9]])
        makd.perplexity(
            tiny("gpt2", "causal_lm", pad_token_id=9), [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
        )

    def test_a_decoder_may_begin_with_padding(self):
        given = padded("right") | {"decoder_input_ids": torch.tensor([[0, 0, 0, 5]] * 3)}
        assert torch.equal(passed(given, tiny("t5"))["decoder_input_ids"], given["decoder_input_ids"])

    def test_of_a_model_without_a_padding_token_nobody_can_tell(self):
        model = tiny("gpt2", "causal_lm", pad_token_id=None)
        makd.perplexity(model, [{"input_ids": padded("right")["input_ids"]}])


def test_what_is_none_is_left_out():
    model = tiny("bert")
    given = batch(model)
    without = makd.fidelity(model, model, [given])
    assert makd.fidelity(model, model, [given | {"token_type_ids": None, "labels": None}]) == without
