"""Folding: factors multiplied out again are what the architecture has there, and give the same outputs."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.pytorch_utils import Conv1D

import makd
from makd.student.folding import added_parameters, factored_linears, fold_
from makd.student.linear import LowRankLinear
from tests.models import batch, tiny


def make_student(name="bert", head="base", **settings):
    return makd.factorize(tiny(name, head=head), makd.Budget(keep_linears=0.5), solver="svd", **settings)


@torch.no_grad()
def difference(one, other):
    inputs = batch(one)
    mine, theirs = one(**inputs)[0], other(**inputs)[0]
    return float((mine - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_a_folded_student_gives_the_same_outputs_within_rounding(name):
    student = make_student(name)
    folded = makd.fold(student)
    assert difference(folded, student) < 1e-5
    assert not factored_linears(folded)
    assert factored_linears(student)


@pytest.mark.parametrize(("name", "auto"), [("bert", AutoModel), ("gpt2", AutoModelForCausalLM)])
def test_some_linears_folded_reload_bit_for_bit(name, auto, tmp_path):
    student = make_student(name, "base" if name == "bert" else "causal_lm")
    chosen = factored_linears(student)[::2]
    folded = makd.fold(student, chosen)
    folded.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert makd.fingerprint(again) == makd.fingerprint(folded)
    ranks = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ranks"]
    assert set(ranks) == set(factored_linears(student)) - set(chosen)
    for module in chosen:
        assert type(again.get_submodule(module)) in (nn.Linear, Conv1D)


def test_a_student_folded_whole_is_a_plain_model(tmp_path):
    folded = makd.fold(make_student())
    folded.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModel.from_pretrained(tmp_path)
    assert makd.fingerprint(again) == makd.fingerprint(folded)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in tiny("bert").parameters())


def test_what_folding_adds_is_counted():
    student = make_student()
    chosen = factored_linears(student)[:3]
    folded = makd.fold(student, chosen)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (folded, student)]
    assert added_parameters(student, chosen) == sizes[0] - sizes[1] > 0


def test_a_head_tied_to_factored_embeddings_stays_tied(tmp_path):
    student = make_student("llama", "causal_lm", vocabulary="factored")
    assert isinstance(student.lm_head, LowRankLinear) or not student.config.tie_word_embeddings
    folded = makd.fold(student)
    assert difference(folded, student) < 1e-5
    folded.save_pretrained(tmp_path)
    assert makd.fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == makd.fingerprint(folded)


def test_a_bias_that_another_module_holds_too_stays_shared(tmp_path):
    student = make_student("bert", "masked_lm", vocabulary="factored")
    folded = makd.fold(student)
    folded.save_pretrained(tmp_path)
    assert makd.fingerprint(AutoModelForMaskedLM.from_pretrained(tmp_path)) == makd.fingerprint(folded)


def test_what_is_trainable_stays_so_and_modes_too():
    student = make_student().train()
    student.requires_grad_(False)
    name = factored_linears(student)[0]
    fold_(student, [name])
    dense = student.get_submodule(name)
    assert dense.training
    assert not dense.weight.requires_grad


def test_a_linear_that_is_not_factored_is_refused_by_name():
    student = make_student()
    with pytest.raises(makd.MakdError, match="Unknown factored matrix 'encoder"):
        makd.fold(student, ["encoder.layer.0.attention.self.qery"])


class TestTheVocabulary:
    @pytest.mark.parametrize(
        ("name", "head", "auto", "tied"),
        [
            ("gpt2", "causal_lm", AutoModelForCausalLM, True),
            ("bert", "masked_lm", AutoModelForMaskedLM, True),
            ("llama", "causal_lm", AutoModelForCausalLM, False),
        ],
    )
    def test_embeddings_and_head_are_folded_too_and_tied_as_the_teachers(self, name, head, auto, tied, tmp_path):
        student = make_student(name, head, vocabulary="factored")
        folded = makd.fold(student)
        assert difference(folded, student) < 1e-5
        ends = folded.get_input_embeddings(), folded.get_output_embeddings()
        assert (type(ends[0]), type(ends[1])) == (nn.Embedding, nn.Linear)
        assert (ends[0].weight is ends[1].weight) == tied
        folded.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        again = auto.from_pretrained(tmp_path)
        assert makd.fingerprint(again) == makd.fingerprint(folded)
        teacher = tiny(name, head)
        assert again.state_dict().keys() == teacher.state_dict().keys()
        assert again.all_tied_weights_keys == teacher.all_tied_weights_keys

    @pytest.mark.parametrize("name", ["lm_head", "transformer.wte"])
    def test_a_tied_head_goes_with_its_embeddings_by_either_name(self, name):
        student = make_student("gpt2", "causal_lm", vocabulary="factored")
        folded = makd.fold(student, [name])
        assert type(folded.lm_head) is nn.Linear
        assert folded.lm_head.weight is folded.transformer.wte.weight
        assert difference(folded, student) < 1e-5
        assert set(factored_linears(folded)) == set(factored_linears(student))

    def test_a_head_of_its_own_is_folded_alone(self):
        student = make_student("llama", "causal_lm", vocabulary="factored")
        folded = makd.fold(student, ["lm_head"])
        assert type(folded.lm_head) is nn.Linear
        assert type(folded.model.embed_tokens) is not nn.Embedding
        assert difference(folded, student) < 1e-5


def test_a_dropped_layer_stays_dropped_and_the_folded_student_says_so(tmp_path):
    teacher = tiny("llama", "causal_lm", num_hidden_layers=4)
    calibration = [batch(teacher)]
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.4), solver="svd", depth=2, calibration=calibration)
    folded = makd.fold(student)
    assert difference(folded, student) < 1e-5
    folded.save_pretrained(tmp_path)
    dropped = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["dropped"]
    assert len(dropped) == 2
    assert makd.fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == makd.fingerprint(folded)


def test_a_folded_student_without_some_layers_is_no_teacher_and_the_way_out_is_told():
    teacher = tiny("bert", num_hidden_layers=4)
    student = makd.factorize(
        teacher, makd.Budget(keep_linears=0.4), solver="svd", depth=2, calibration=[batch(teacher)]
    )
    for model, message in ((makd.fold(student), "export STUDENT --to dense"), (student, "factored already")):
        with pytest.raises(makd.MakdError, match=message):
            makd.factorize(model, makd.Budget(keep_linears=0.5), solver="svd")
