"""A student is an ordinary model: how it saves, loads, and refuses what does not fit."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import makd
from makd.student.linear import LowRankLinear
from tests.models import batch, numbers_in, tiny

HEADS = {
    "base": AutoModel,
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
}


def make_student(name="bert", head="base", keep=0.5):
    return makd.factorize(tiny(name, head=head), makd.Budget(keep_linears=keep), solver="svd")


@pytest.mark.parametrize("head", HEADS)
def test_every_encoder_head_reloads_bit_for_bit(head, tmp_path):
    student = make_student("bert", head)
    student.save_pretrained(tmp_path)
    again = HEADS[head].from_pretrained(tmp_path)
    inputs = batch(student)
    with torch.no_grad():
        for mine, theirs in zip(again(**inputs).to_tuple(), student(**inputs).to_tuple(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt_neox"])
def test_causal_language_models_reload_bit_for_bit(name, tmp_path):
    student = make_student(name, "causal_lm")
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = batch(student)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, student(**inputs).logits)


def test_a_student_saved_without_a_head_loads_under_one(tmp_path):
    student = make_student("bert")
    student.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(classifier.bert.encoder.layer[0].attention.self.query, LowRankLinear)
    inputs = batch(student)
    with torch.no_grad():
        assert torch.equal(classifier.bert(**inputs)[0], student(**inputs)[0])


def test_a_student_saved_under_a_head_loads_without(tmp_path):
    student = make_student("bert", "masked_lm")
    student.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    inputs = batch(student)
    with torch.no_grad():
        assert torch.equal(base(**inputs)[0], student.bert(**inputs)[0])


def test_shards_hold_the_student_and_reload(tmp_path):
    student = make_student("llama", "causal_lm")
    student.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert makd.fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == makd.fingerprint(student)


def test_tied_weights_are_stored_once(tmp_path):
    student = make_student("gpt2", "causal_lm")
    assert student.lm_head.weight is student.transformer.wte.weight
    student.save_pretrained(tmp_path)
    stored = numbers_in(tmp_path)
    assert stored == sum(parameter.numel() for parameter in student.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight


def test_dtype_and_device_map_work_as_on_any_model(tmp_path):
    make_student("bert").save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert again.float().dtype == torch.float32
    assert again.half().dtype == torch.float16


def test_nothing_of_the_quantizer_stays_on_a_loaded_student(tmp_path):
    make_student("bert").save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert not getattr(again, "is_quantized", False)
    assert not hasattr(again, "hf_quantizer")


def test_a_loaded_student_saves_and_loads_again(tmp_path):
    student = make_student("bert")
    student.save_pretrained(tmp_path / "one")
    AutoModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert makd.fingerprint(AutoModel.from_pretrained(tmp_path / "two")) == makd.fingerprint(student)


def test_resized_embeddings_still_load(tmp_path):
    student = make_student("bert")
    student.resize_token_embeddings(70, mean_resizing=False)
    student.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).get_input_embeddings().weight.shape[0] == 70


def test_a_parameter_count_that_differs_from_the_config_raises(tmp_path):
    make_student("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["parameters"]["factored"] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(makd.MakdError, match="parameters of factored linears; config"):
        AutoModel.from_pretrained(tmp_path)


def test_a_head_of_another_size_is_a_new_one_where_that_is_asked_for(tmp_path):
    make_student("bert", "sequence_classification").save_pretrained(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    again = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert again.classifier.out_features == 5
    assert makd.fingerprint(again.bert) == makd.fingerprint(load(tmp_path).bert)


def test_a_part_that_is_asked_to_be_left_out_is(tmp_path):
    make_student("bert").save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).pooler is None


@pytest.mark.parametrize("head", [AutoModel, AutoModelForSequenceClassification])
def test_the_config_of_a_loaded_student_loads_it_again(head, tmp_path):
    student = make_student("bert")
    student.save_pretrained(tmp_path)
    config = copy.deepcopy(AutoModel.from_pretrained(tmp_path).config)
    again = head.from_pretrained(tmp_path, config=config)
    assert makd.fingerprint(getattr(again, "bert", again)) == makd.fingerprint(student)


def test_a_rank_that_differs_from_the_weights_raises(tmp_path):
    make_student("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ranks = config["quantization_config"]["ranks"]
    name = next(iter(ranks))
    ranks[name] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(makd.MakdError, match="Weights and config are of different students"):
        AutoModel.from_pretrained(tmp_path)


def test_weights_without_a_factor_raise_instead_of_being_filled_at_random(tmp_path):
    make_student("bert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(key for key in tensors if key.endswith("reduce.weight"))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(makd.MakdError, match="The weight files hold"):
        AutoModel.from_pretrained(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    make_student("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(makd.MakdError, match="Update makd"):
        AutoModel.from_pretrained(tmp_path)


def test_an_encoder_alone_loads_from_an_encoder_decoder_student(tmp_path):
    from transformers import T5EncoderModel

    student = make_student("t5")
    student.save_pretrained(tmp_path)
    encoder = T5EncoderModel.from_pretrained(tmp_path)
    inputs = {key: value for key, value in batch(student).items() if not key.startswith("decoder")}
    with torch.no_grad():
        assert torch.equal(encoder(**inputs)[0], student.encoder(**inputs)[0])
