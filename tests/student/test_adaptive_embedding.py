"""Embeddings in bands: each token's row is that of its band, whatever is done with the student afterwards."""

import copy
import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

import makd
from makd.student.adaptive_embedding import AdaptiveEmbedding
from makd.student.counting import count_parameters
from tests.models import batch, numbers_in, tiny

VOCABULARY = 640
BANDS = "embeddings.word_embeddings"


def make_layer(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    layer = AdaptiveEmbedding(6, (3, 7, 10), (None, 4, 1), order=order, dtype=dtype, **settings)
    return layer, order


def make_student(name="bert", head="base", keep=0.3):
    return copy.deepcopy(_made(name, head, keep))


@cache
def _made(name, head, keep):
    teacher = tiny(name, head, vocab_size=VOCABULARY)
    texts = [batch(teacher), batch(teacher, seed=3)]
    return makd.factorize(
        teacher, makd.Budget(keep=keep), calibration=texts, vocabulary="factored", depth="all", rank_multiple=1
    )


def by_hand(layer, token):
    """The row of one token, found by counting through the bands."""
    row = int(layer.order[token])
    for band, count in zip(layer.bands, layer.rows, strict=True):
        if row < count:
            found = band.table.weight[row]
            return found if band.directions is None else found @ band.directions.weight
        row -= count
    raise AssertionError("no band has this row")


class TestLayer:
    def test_a_token_has_the_row_of_its_band(self):
        layer, _ = make_layer()
        ids = torch.tensor([[0, 5, 19], [7, 7, 12]])
        expected = torch.stack([torch.stack([by_hand(layer, token) for token in row]) for row in ids.tolist()])
        torch.testing.assert_close(layer(ids), expected, rtol=0, atol=1e-12)

    def test_its_dense_weight_is_what_it_looks_up(self):
        layer, _ = make_layer()
        torch.testing.assert_close(layer.dense_weight(), layer(torch.arange(20)), rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.weight, layer.dense_weight(), rtol=0, atol=0)

    def test_only_the_bands_of_the_tokens_that_were_read_learn(self):
        layer, order = make_layer()
        frequent = torch.nonzero(order < 3).flatten()
        layer(frequent).sum().backward()
        assert bool((layer.bands[0].table.weight.grad != 0).all())
        for band in list(layer.bands)[1:]:
            assert float(band.table.weight.grad.abs().max()) == 0

    def test_the_padding_token_does_not_learn(self):
        layer, _ = make_layer(padding_idx=4)
        layer(torch.tensor([4, 4])).sum().backward()
        assert all(float(parameter.grad.abs().max()) == 0 for parameter in layer.parameters())

    @pytest.mark.parametrize(("rows", "ranks"), [((3,), (1, 1)), ((3, 4), (4, 1)), ((3, 4), (1, 0)), ((), ())])
    def test_bands_that_are_none_are_refused(self, rows, ranks):
        with pytest.raises(ValueError, match="rank"):
            AdaptiveEmbedding(6, rows, ranks)

    def test_another_precision_leaves_the_order_whole(self):
        layer, order = make_layer()
        assert torch.equal(layer.half().order, order.int())


class TestStudent:
    def test_frequent_tokens_are_kept_better_than_rare_ones(self):
        student = make_student()
        embeddings = student.get_input_embeddings()
        assert isinstance(embeddings, AdaptiveEmbedding)
        dense = tiny("bert", vocab_size=VOCABULARY).get_input_embeddings().weight
        errors = (embeddings.dense_weight() - dense).detach().square().sum(1)[embeddings.order.argsort()]
        means = [float(part.mean()) for part in errors.split(embeddings.rows)]
        assert means[0] < 0.5 * means[-1]

    def test_tokens_stand_in_the_order_of_their_frequency(self):
        student = make_student()
        teacher = tiny("bert", vocab_size=VOCABULARY)
        read = torch.cat(
            [text["input_ids"][text["attention_mask"].bool()] for text in (batch(teacher), batch(teacher, seed=3))]
        )
        counts = torch.bincount(read, minlength=VOCABULARY)
        in_order = counts[student.get_input_embeddings().order.argsort()]
        assert bool((in_order[:-1] >= in_order[1:]).all())

    def test_the_order_counts_as_a_parameter_a_token(self):
        student = make_student(keep=0.3)
        teacher = tiny("bert", vocab_size=VOCABULARY)
        counts = count_parameters(student)
        assert counts["total"] == sum(p.numel() for p in student.parameters()) + VOCABULARY
        assert makd.inspect(student).parameters == counts["total"]
        assert makd.inspect(student).embedding_parameters == counts["vocabulary"]
        assert counts["total"] <= 0.3 * sum(p.numel() for p in teacher.parameters())

    def test_it_reloads_bit_for_bit(self, tmp_path):
        student = make_student()
        student.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        assert makd.fingerprint(again) == makd.fingerprint(student)
        assert numbers_in(tmp_path) == count_parameters(student)["total"] - VOCABULARY

    def test_it_loads_under_another_head(self, tmp_path):
        student = make_student()
        student.save_pretrained(tmp_path)
        headed = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        assert torch.equal(headed.bert(**batch(student))[0], student(**batch(student))[0])

    def test_a_head_that_is_tied_to_the_embeddings_is_refused(self, tmp_path):
        make_student().save_pretrained(tmp_path)
        with pytest.raises(makd.MakdError, match="in bands of several ranks here, and no head can share"):
            AutoModelForMaskedLM.from_pretrained(tmp_path)

    def test_folded_it_is_a_plain_model_with_the_same_outputs(self, tmp_path):
        student = make_student()
        folded = makd.fold(student)
        assert type(folded.get_input_embeddings()) is nn.Embedding
        torch.testing.assert_close(folded(**batch(student))[0], student(**batch(student))[0], rtol=1e-4, atol=1e-5)
        folded.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())

    def test_a_decoder_with_a_head_of_its_own_has_bands_and_writes(self):
        student = make_student("llama", "causal_lm")
        assert isinstance(student.get_input_embeddings(), AdaptiveEmbedding)
        written = student.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
        assert written.shape == (1, 7)

    def test_embeddings_that_a_head_shares_have_one_rank(self):
        student = make_student("bert", "masked_lm")
        assert not isinstance(student.get_input_embeddings(), AdaptiveEmbedding)

    def test_adapters_go_on_the_tables_of_its_bands(self):
        student = make_student()
        named = makd.adapter_targets(student, ["word_embeddings"])
        assert named == [f"{BANDS}.bands.{band}.table" for band in range(4)]

    def test_resizing_is_refused(self):
        with pytest.raises(TypeError, match="not an instance of"):
            make_student().resize_token_embeddings(700)

    def test_a_copy_is_the_same(self):
        student = make_student()
        assert makd.fingerprint(copy.deepcopy(student)) == makd.fingerprint(student)


class TestFiles:
    def change(self, folder, **entries):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["embeddings"][BANDS] |= entries
        (folder / "config.json").write_text(json.dumps(config))

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"rows": [10, 30, 120, 400]}, "matrix of 640 x 32"),
            ({"ranks": [32, 32, 33, 1]}, "matrix of 640 x 32"),
            ({"rows": [10, 30]}, "names of embeddings with their ranks"),
            ({"ranks": [1, 1, 1, "many"]}, "names of embeddings with their ranks"),
            ({"more": 1}, "names of embeddings with their ranks"),
        ],
    )
    def test_bands_that_do_not_fit_are_refused(self, entries, message, tmp_path):
        make_student().save_pretrained(tmp_path)
        self.change(tmp_path, **entries)
        with pytest.raises(makd.MakdError, match=message):
            AutoModel.from_pretrained(tmp_path)

    @pytest.mark.parametrize("row", [0, VOCABULARY])
    def test_an_order_that_is_none_is_refused(self, row, tmp_path):
        make_student().save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[f"{BANDS}.order"][:2] = row
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(makd.MakdError, match="a row of its own"):
            AutoModel.from_pretrained(tmp_path)

    def test_files_without_the_order_are_refused(self, tmp_path):
        make_student().save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors[f"{BANDS}.order"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(makd.MakdError, match="lack"):
            AutoModel.from_pretrained(tmp_path)

    def test_the_format_is_that_of_bands_where_there_are_some_and_of_before_elsewhere(self):
        assert make_student().config.quantization_config.format == 7
        assert make_student("bert", "masked_lm").config.quantization_config.format == 4
