"""From a name to a model: what is understood, and what is refused with a word that helps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

import makd
from makd.errors import ModelLoadError, NumericsError
from makd.loading import (
    load_config,
    load_empty_model,
    load_learner,
    load_model,
    load_tokenizer,
    locate,
    take_model,
)
from makd.weights.on_disk import Checkpoint
from tests.distill.test_trainer import make_arguments
from tests.models import TINY, tiny


@pytest.fixture(scope="module")
def student_folder(encoder_folder, tmp_path_factory):
    """A student of the tiny encoder."""
    folder = tmp_path_factory.mktemp("student")
    teacher = load_model(str(encoder_folder))
    makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", "name is empty"),
        ("package:", "not installed"),
        ("package:no_such_package/model", "not installed"),
        ("package:no_such_package.inside/model", "not installed"),
        ("package:torch/nowhere", "has no 'nowhere' in it"),
        ("./nowhere", "does not exist"),
        ("model.gguf", "does not exist"),
        ("a/b/c", "does not exist"),
        ("x" * 300, "at most 255 bytes"),
    ],
)
def test_names_that_lead_nowhere_are_refused(name, hint):
    with pytest.raises(makd.MakdError, match=hint):
        locate(name)


def test_a_hub_id_is_left_to_the_hub():
    assert locate("some-org/some-model").folder == "some-org/some-model"


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_weights_that_were_cut_off_are_refused(encoder_folder, tmp_path, size):
    folder = tmp_path / "model"
    shutil.copytree(encoder_folder, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(makd.MakdError, match="No model could be loaded"):
        load_model(str(folder))


def test_a_config_that_is_no_json_is_refused(encoder_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(encoder_folder, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(makd.MakdError, match=r"config\.json is damaged"):
        load_model(str(folder))


def test_a_model_is_loaded_in_eval_mode_in_the_dtype_asked_for(encoder_folder):
    model = load_model(str(encoder_folder), dtype=torch.bfloat16)
    assert not model.training
    assert model.dtype == torch.bfloat16


def test_a_tokenizer_without_padding_pads_with_its_end_of_text_token(decoder_folder, tokenizer, tmp_path):
    shutil.copytree(decoder_folder, tmp_path / "model")
    bare = load_tokenizer(str(decoder_folder))
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "model")
    assert load_tokenizer(str(tmp_path / "model")).pad_token == "[SEP]"


# what a checkpoint's files say


def spoiled(folder, target, **changes):
    """A copy of a checkpoint, with other values in its config.json; `...` takes a value out."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config = {name: value for name, value in {**config, **changes}.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(config))
    return target


def with_weights(folder, change):
    """Change the tensors of a checkpoint in place."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.mark.parametrize("load", [load_model, load_empty_model, load_config])
def test_a_config_of_too_many_levels_is_refused(encoder_folder, tmp_path, load):
    folder = spoiled(encoder_folder, tmp_path / "model")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelLoadError, match=r"config\.json is damaged: it is not JSON"):
        load(str(folder))


@pytest.mark.parametrize("content", [[], None, 3, "bert", [{"model_type": "bert"}]])
@pytest.mark.parametrize("load", [load_model, load_empty_model, load_config])
def test_a_config_that_is_no_object_is_refused(encoder_folder, tmp_path, content, load):
    folder = spoiled(encoder_folder, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match=r"config\.json holds an object"):
        load(str(folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", None),
        ("num_hidden_layers", 2.5),
        ("num_attention_heads", 0),
        ("model_type", 5),
        ("model_type", ...),
        ("model_type", "no_such_model"),
        ("hidden_act", "no_such_function"),
        ("id2label", [1]),
        ("architectures", 5),
        ("architectures", {"a": 1}),
        ("architectures", [1]),
        ("vocab_size", -1),
        ("pad_token_id", "zero"),
    ],
)
def test_a_config_with_a_value_of_the_wrong_kind_is_refused(encoder_folder, tmp_path, name, value):
    with pytest.raises(ModelLoadError):
        load_model(str(spoiled(encoder_folder, tmp_path / "model", **{name: value})))


@pytest.mark.parametrize("load", [load_model, load_empty_model, load_config])
def test_a_padding_token_beyond_the_embeddings_is_refused(encoder_folder, tmp_path, load):
    with pytest.raises(ModelLoadError, match="pad_token_id 300, but embeddings for 300 tokens"):
        load(str(spoiled(encoder_folder, tmp_path / "model", pad_token_id=300)))


@pytest.mark.parametrize(
    ("index", "hint"),
    [
        ([], "holds an object"),
        (None, "holds an object"),
        ({}, "weight_map"),
        ({"weight_map": None}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"a": 5}}, "weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside its folder"),
        ({"weight_map": {"a": "inside/../../model.safetensors"}}, "outside its folder"),
        ({"weight_map": {"a": "absent.safetensors"}}, "does not exist"),
    ],
)
@pytest.mark.parametrize("load", [load_model, lambda name: Checkpoint(Path(name), load_empty_model(name)[0])])
def test_an_index_of_shards_that_is_none_or_leads_out_of_the_folder_is_refused(
    encoder_folder, tmp_path, index, hint, load
):
    folder = spoiled(encoder_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=hint):
        load(str(folder))


def test_a_head_that_transformers_does_not_know_is_refused_until_one_is_chosen(encoder_folder, tmp_path):
    folder = str(spoiled(encoder_folder, tmp_path / "model", architectures=["BertForNothing"]))
    with pytest.raises(ModelLoadError, match=r"BertForNothing.*recipe\.head"):
        load_model(folder)
    assert type(load_model(folder, "base")).__name__ == "BertModel"


def test_a_name_in_transformers_that_is_no_model_is_no_head(encoder_folder, tmp_path):
    with pytest.raises(ModelLoadError, match="BertConfig"):
        load_model(str(spoiled(encoder_folder, tmp_path / "model", architectures=["BertConfig"])))


def test_a_config_that_names_no_head_is_told(encoder_folder, tmp_path, caplog):
    load_model(str(spoiled(encoder_folder, tmp_path / "model", architectures=...)))
    assert "does not say which head" in caplog.text


# whether a model is all from its files


QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda old: {name: w for name, w in old.items() if name != QUERY}, rf"lacks weights of a BertModel: {QUERY}"),
        (lambda old: {f"other.{name}": w for name, w in old.items()}, r"lacks weights.*and \d+ others.*no place"),
        (lambda old: {"something": torch.zeros(2)}, "lacks weights.*something"),
        (lambda old: {name.replace("query", "q_proj"): w for name, w in old.items()}, r"lacks.*query.*q_proj"),
        (lambda old: {**old, QUERY: torch.zeros(16, 32)}, rf"{QUERY} has shape \(16, 32\).*\(32, 32\)"),
        (lambda old: {**old, "encoder.layer.2.output.dense.weight": torch.zeros(32, 64)}, "layers that its config"),
        (lambda old: {**old, "encoder.layer.0.attention.self.query.gate": torch.zeros(2)}, "layers that its config"),
    ],
)
def test_weights_that_are_missing_renamed_foreign_or_left_over_are_refused(encoder_folder, tmp_path, change, hint):
    folder = with_weights(spoiled(encoder_folder, tmp_path / "model"), change)
    with pytest.raises(ModelLoadError, match=hint):
        load_model(str(folder))


def test_a_config_with_fewer_layers_than_the_files_is_refused(encoder_folder, tmp_path):
    with pytest.raises(ModelLoadError, match=r"encoder\.layer\.1.*left out"):
        load_model(str(spoiled(encoder_folder, tmp_path / "model", num_hidden_layers=1)))


@pytest.mark.parametrize("head", ["masked_lm", "sequence_classification", "token_classification", "question_answering"])
def test_a_head_that_the_checkpoint_does_not_have_is_not_made_up(encoder_folder, head):
    with pytest.raises(ModelLoadError, match=r"no such head.*makd finetune"):
        load_model(str(encoder_folder), head)


def test_a_decoder_whose_untied_head_is_missing_is_refused(tmp_path):
    tiny("llama", "causal_lm").save_pretrained(tmp_path)
    with_weights(tmp_path, lambda old: {name: w for name, w in old.items() if name != "lm_head.weight"})
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight"):
        load_model(str(tmp_path))


def test_a_learner_gets_a_new_head_but_no_new_layers(encoder_folder, tmp_path):
    assert load_learner(str(encoder_folder), "sequence_classification", num_labels=3).config.num_labels == 3
    folder = with_weights(
        spoiled(encoder_folder, tmp_path / "model"), lambda old: {name: w for name, w in old.items() if name != QUERY}
    )
    with pytest.raises(ModelLoadError, match=rf"lacks weights.*{QUERY}"):
        load_learner(str(folder), "sequence_classification", num_labels=3)


HEADS_OF = dict.fromkeys(("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3",
                          "falcon", "bloom", "codegen", "gpt_bigcode"), "causal_lm")  # fmt: skip
HEADS_OF |= dict.fromkeys(("t5", "t5_gated", "bart"), "seq2seq_lm")


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_loads_whole_as_it_was_saved_and_without_its_head(name, tmp_path):
    head = HEADS_OF.get(name, "masked_lm")
    model = tiny(name, head)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    load_model(str(tmp_path), "base")


def test_a_masked_language_model_loads_without_its_head_though_it_has_no_pooler(tmp_path):
    tiny("bert", "masked_lm").save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path), "base")).__name__ == "BertModel"


@pytest.mark.parametrize("load", [load_model, lambda name: load_learner(name, "sequence_classification", num_labels=2)])
@pytest.mark.parametrize("whose", ["encoder_folder", "student_folder"])
def test_a_pooler_may_be_missing_and_is_refused_in_another_shape(whose, load, request, tmp_path):
    folder = with_weights(
        spoiled(request.getfixturevalue(whose), tmp_path / "model"),
        lambda old: {**old, "pooler.dense.bias": old["pooler.dense.bias"][:-1].clone()},
    )
    with pytest.raises(ModelLoadError, match=r"pooler\.dense\.bias has shape \(31,\) in its files.*makes it \(32,\)"):
        load(str(folder))


def test_a_student_without_its_quantization_config_is_refused(student_folder, tmp_path):
    with pytest.raises(ModelLoadError, match="holds the weights of a makd student"):
        load_model(str(spoiled(student_folder, tmp_path / "model", quantization_config=...)))


def test_a_student_that_lacks_a_plain_weight_is_refused(student_folder, tmp_path):
    folder = with_weights(
        spoiled(student_folder, tmp_path / "model"),
        lambda old: {name: w for name, w in old.items() if name != "embeddings.LayerNorm.weight"},
    )
    with pytest.raises(ModelLoadError, match=r"embeddings\.LayerNorm\.weight"):
        load_model(str(folder))


# weights that are no numbers, or are not here


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("load", [load_model, lambda name: load_learner(name, "sequence_classification", num_labels=2)])
def test_weights_that_are_not_finite_are_refused_when_they_are_loaded(encoder_folder, tmp_path, value, load):
    def spoil(old):
        old[QUERY][3, 5] = value
        return old

    with pytest.raises(NumericsError, match=r"query\.weight holds NaN or infinity"):
        load(str(with_weights(spoiled(encoder_folder, tmp_path / "model"), spoil)))


def test_weights_that_overflow_in_the_dtype_asked_for_are_refused(encoder_folder, tmp_path):
    folder = with_weights(spoiled(encoder_folder, tmp_path / "model"), lambda old: {**old, QUERY: old[QUERY] + 1e6})
    load_model(str(folder), dtype=torch.bfloat16)
    with pytest.raises(NumericsError, match="dtype too narrow"):
        load_model(str(folder), dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
@pytest.mark.parametrize("load", [load_model, lambda name: Checkpoint(Path(name), load_empty_model(name)[0])])
def test_weights_that_are_stored_as_whole_numbers_are_refused(encoder_folder, tmp_path, dtype, load):
    name = "encoder.layer.1.output.dense.weight"
    folder = with_weights(spoiled(encoder_folder, tmp_path / "model"), lambda old: old | {name: old[name].to(dtype)})
    with pytest.raises(ModelLoadError, match=rf"{name} is stored as {str(dtype)[6:]}"):
        load(str(folder))


def test_so_are_a_students_factors(student_folder, tmp_path):
    name = "encoder.layer.1.output.dense.reduce.weight"
    folder = with_weights(spoiled(student_folder, tmp_path / "model"), lambda old: old | {name: old[name].int()})
    with pytest.raises(ModelLoadError, match=f"{name} is stored as int32"):
        load_model(str(folder))


def test_positions_that_old_checkpoints_hold_are_whole_numbers_and_no_weights(encoder_folder, tmp_path):
    positions = {"embeddings.position_ids": torch.arange(64)[None]}
    load_model(str(with_weights(spoiled(encoder_folder, tmp_path / "model"), lambda old: old | positions)))


def quantized():
    model = tiny("bert")
    model.is_quantized = True
    return model


def stored_as_codes():
    model = tiny("bert")
    linear = model.get_submodule("encoder.layer.0.attention.self.query")
    linear.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    return model


class Codes(torch.Tensor):
    """Whole numbers and a scale that pass for a float32 tensor, as torchao's `quantize_` leaves weights."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return Codes(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        return function(*tree_map(lambda one: one.codes * one.scale if isinstance(one, cls) else one, args))


def quantized_in_place():
    model = tiny("bert")
    linear = model.get_submodule("encoder.layer.0.attention.self.query")
    codes = Codes(torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 1))
    linear.weight = torch.nn.Parameter(codes, requires_grad=False)
    return model


def offloaded():
    return cpu_offload(tiny("bert"))


def on_meta():
    return tiny("bert").to("meta")


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (quantized, "quantized"),
        (stored_as_codes, "quantized"),
        (quantized_in_place, r"quantized weights \(encoder.layer.0.attention.self.query.weight is stored as Codes\)"),
        (offloaded, "not in memory"),
        (on_meta, "not in memory"),
    ],
)
def test_models_in_hand_that_are_quantized_or_offloaded_are_refused(make, hint):
    with pytest.raises(ModelLoadError, match=hint):
        take_model(make(), "auto", torch.float32, torch.device("cpu"))
    with pytest.raises(ModelLoadError, match=hint):
        makd.factorize(make(), makd.Budget(keep_linears=0.5), solver="svd")
    with pytest.raises(ModelLoadError, match=hint):
        makd.DistillTrainer(tiny("bert"), make(), "feature")


def test_a_model_in_hand_that_is_spread_over_devices_is_refused_but_as_a_teacher(tmp_path):
    model, student = tiny("bert"), tiny("bert")
    model.hf_device_map = {"embeddings": 0, "encoder.layer.0": 0, "encoder.layer.1": 1, "pooler": 1}
    with pytest.raises(ModelLoadError, match=r"BertModel is spread over devices \(0, 1\)"):
        take_model(model, "auto", torch.float32, torch.device("cpu"))
    with pytest.raises(ModelLoadError, match="spread over devices"):
        makd.factorize(model, makd.Budget(keep_linears=0.5), solver="svd")
    with pytest.raises(ModelLoadError, match="spread over devices"):
        makd.DistillTrainer(model, student, "feature", args=make_arguments(tmp_path))
    makd.DistillTrainer(student, model, "feature", args=make_arguments(tmp_path))


@pytest.mark.parametrize(("name", "value"), [("num_attention_heads", -1), ("num_hidden_layers", 10**12)])
@pytest.mark.parametrize("load", [load_model, load_config, lambda name: load_empty_model(name, "auto", torch.float32)])
def test_a_config_that_counts_what_no_model_has_is_refused_before_anything_is_built(
    load, name, value, encoder_folder, tmp_path
):
    folder = str(spoiled(encoder_folder, tmp_path / "model", **{name: value}))
    with pytest.raises(ModelLoadError, match=f"`{name}` in config.json is {value:,}; a model has 0 to"):
        load(folder)
