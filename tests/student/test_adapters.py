"""peft's adapters on a student: by names of its factors, merged they give what they gave before."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import makd
from makd.errors import SettingError, UnknownNameError, UnsupportedModelError
from tests.models import batch, tiny
from tests.student.learning import learn

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),
]
QKV = ["q_proj", "k_proj", "v_proj"]


def make_student(name, head="causal_lm", **settings):
    return makd.factorize(tiny(name, head), makd.Budget(keep_linears=0.5), solver="svd", **settings)


def adapt(student, targets, **settings):
    """With adapters that do something from the start."""
    return get_peft_model(student, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **settings))


@torch.no_grad()
def outputs(model):
    return model.eval()(**batch(model))[0]


def in_layers(names):
    return {name.partition("layers.")[2] for name in names}


@pytest.mark.parametrize(
    ("name", "head", "targets", "settings"),
    [
        ("qwen2", "causal_lm", None, {}),
        ("qwen2", "causal_lm", QKV, {}),
        ("qwen2", "causal_lm", "all-linear", {}),
        ("qwen2", "causal_lm", r".*\.layers\.1\..*_proj", {}),
        ("qwen2", "causal_lm", QKV, {"share_input": "always"}),
        ("qwen2", "causal_lm", ["q_proj"], {"share_input": "always"}),
        ("qwen2", "causal_lm", "all-linear", {"vocabulary": "factored"}),
        ("qwen2", "causal_lm", ["embed_tokens", "lm_head"], {"vocabulary": "factored"}),
        ("gpt2", "causal_lm", None, {}),
        ("gpt2", "causal_lm", "all-linear", {"vocabulary": "factored"}),
        ("bert", "sequence_classification", ["query", "classifier"], {}),
        ("t5", "seq2seq_lm", None, {}),
    ],
    ids=str,
)
def test_an_adapter_on_what_is_named_is_merged_to_what_it_gave(name, head, targets, settings):
    student = make_student(name, head, **settings)
    before = outputs(student)
    adapted = adapt(student, makd.adapter_targets(student, targets))
    given = outputs(adapted)
    assert (given - before).abs().max() > 0.01
    torch.testing.assert_close(outputs(adapted.merge_and_unload()), given, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "bert"])
def test_without_targets_they_are_those_that_peft_adapts_in_the_teacher(name):
    teacher = tiny(name, "causal_lm" if name == "qwen2" else "base")
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")
    of_teacher = get_peft_model(copy.deepcopy(teacher), LoraConfig()).base_model.targeted_module_names
    found = makd.adapter_targets(student)
    assert found == [f"{linear}.{factor}" for linear in of_teacher for factor in ("reduce", "expand")]


def test_all_linears_are_those_that_peft_adapts_in_the_teacher():
    teacher = tiny("gpt2", "causal_lm")
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), vocabulary="factored", solver="svd")
    of_teacher = get_peft_model(copy.deepcopy(teacher), LoraConfig(target_modules="all-linear", fan_in_fan_out=True))
    found = makd.adapter_targets(student, "all-linear")
    assert {name.removesuffix(".reduce").removesuffix(".expand") for name in found} == set(
        of_teacher.base_model.targeted_module_names
    )


def test_what_is_dense_goes_by_its_own_name():
    assert makd.adapter_targets(tiny("qwen2", "causal_lm"), ["v_proj", "lm_head"]) == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "lm_head",
    ]


def test_an_a_that_others_share_is_adapted_only_with_all_of_them():
    student = make_student("qwen2", share_input="always")
    assert in_layers(makd.adapter_targets(student, ["q_proj", "v_proj"])) == {
        f"{layer}.self_attn.{name}.expand" for layer in (0, 1) for name in ("q_proj", "v_proj")
    }
    assert in_layers(makd.adapter_targets(student, QKV)) == {
        f"{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj.reduce", *(f"{x}.expand" for x in QKV))
    }


def test_names_are_the_same_beside_an_adapter_that_is_there():
    student = make_student("qwen2")
    names = makd.adapter_targets(student, QKV)
    adapted = adapt(student, names)
    assert makd.adapter_targets(adapted.get_base_model(), QKV) == names


@pytest.mark.parametrize(
    ("name", "targets"),
    [("gpt2", ["wte"]), ("gpt2", ["lm_head"]), ("gpt2", ["reduce"]), ("gpt2", ".*table")],
    ids=str,
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_vocabulary_that_is_used_twice_gets_no_names(name, targets, loaded, tmp_path):
    student = make_student(name, vocabulary="factored")
    if loaded:
        student.save_pretrained(tmp_path)
        student = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="Leave embeddings and LM head out"):
        makd.adapter_targets(student, targets)


def test_a_dense_vocabulary_that_is_used_twice_gets_no_names():
    with pytest.raises(UnsupportedModelError, match="Leave embeddings and LM head out"):
        makd.adapter_targets(make_student("gpt2"), ["lm_head"])


@pytest.mark.parametrize("name", ["wte.table", "lm_head.reduce", "lm_head.expand"])
@pytest.mark.parametrize("loaded", [False, True])
def test_an_adapter_on_a_vocabulary_that_is_used_twice_is_refused_where_it_is_put(name, loaded, tmp_path):
    student = make_student("gpt2", vocabulary="factored")
    if loaded:
        student.save_pretrained(tmp_path)
        student = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="Leave embeddings and LM head out"):
        adapt(student, [name])


def test_directions_of_a_vocabulary_are_no_linear_to_adapt():
    student = make_student("llama", vocabulary="factored")
    with pytest.raises(UnknownNameError, match="Unknown linear to adapt 'directions'"):
        makd.adapter_targets(student, ["directions"])
    with pytest.raises(ValueError, match=r"Target module Directions.* is not supported"):
        adapt(student, ["directions"])


def test_an_adapter_on_the_directions_of_a_vocabulary_as_a_parameter_is_merged_to_what_it_gave():
    student = make_student("llama", vocabulary="factored")
    before = outputs(student)
    adapted = adapt(student, [], target_parameters=["embed_tokens.directions.weight"])
    expected = outputs(adapted)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(outputs(adapted.merge_and_unload()), expected)


def test_an_adapter_on_directions_that_a_head_has_too_is_refused_as_a_parameter():
    with pytest.raises(UnsupportedModelError, match="Leave embeddings and LM head out"):
        adapt(make_student("gpt2", vocabulary="factored"), [], target_parameters=["wte.directions.weight"])


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["q_prj"], UnknownNameError, "Did you mean 'q_proj'"),
        (["q_proj", "query"], UnknownNameError, "'query'"),
        ("q_proj", SettingError, "meant by 'q_proj'"),
        ([], SettingError, "meant by"),
        (3, SettingError, "targets of adapter_targets"),
    ],
    ids=str,
)
def test_names_of_nothing_are_told(targets, error, message):
    with pytest.raises(error, match=message):
        makd.adapter_targets(make_student("qwen2"), targets)


def test_an_architecture_that_peft_has_no_choice_for_is_told():
    with pytest.raises(SettingError, match="no choice of its own for 'phi3'"):
        makd.adapter_targets(make_student("phi3"))


def test_adapters_are_trained_saved_loaded_and_merged(tmp_path):
    student = make_student("qwen2")
    student.save_pretrained(tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    factors = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=makd.adapter_targets(student)))
    inputs = batch(adapted)
    losses = learn(adapted, inputs, 5)
    assert losses[-1] < losses[0]
    trained = outputs(adapted)
    adapted.save_pretrained(tmp_path / "adapters")

    other = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "student"), tmp_path / "adapters", is_trainable=False
    )
    base = {
        name.replace(".base_layer", ""): weight
        for name, weight in other.get_base_model().named_parameters()
        if "lora" not in name
    }
    assert base.keys() == factors.keys()
    assert all(torch.equal(base[name], factors[name]) for name in factors)
    torch.testing.assert_close(outputs(other), trained)
    torch.testing.assert_close(outputs(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")), trained)

    other.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged), trained, rtol=1e-4, atol=1e-5)
    assert sum(w.numel() for w in merged.parameters()) == sum(w.numel() for w in factors.values())


def test_relatives_of_lora_take_the_same_names():
    student = make_student("qwen2")
    names = makd.adapter_targets(student, QKV)
    adapted = get_peft_model(student, IA3Config(target_modules=names, feedforward_modules=[], init_ia3_weights=False))
    given = outputs(adapted)
    torch.testing.assert_close(outputs(adapted.merge_and_unload()), given, rtol=1e-3, atol=1e-4)


def test_a_quantity_of_names_is_matched_exactly():
    """peft condenses long lists of names to how they end."""
    student = make_student("qwen2")
    names = makd.adapter_targets(student, "all-linear")
    adapted = adapt(student, names)
    found = [name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "base_layer")]
    assert found == names
