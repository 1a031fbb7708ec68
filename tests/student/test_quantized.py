"""A student's factors quantized by torchao and bitsandbytes: loaded, saved, loaded again, trained by adapters."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    TorchAoConfig,
)
from transformers.quantizers.auto import AutoHfQuantizer

import makd
from makd.errors import ModelLoadError, UnsupportedModelError
from makd.student.linear import LowRankLinear
from tests.models import batch, tiny
from tests.student.learning import learn

SOURCE = Path(makd.__file__).parents[1]
QUANTIZERS = [
    pytest.mark.slow,  # their imports alone take 10 s
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("torchao", "bitsandbytes"))),
        reason="torchao or bitsandbytes is not installed: `pip install 'makd[quantize]'`",
    ),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft, of transformers
]


def int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def int8_dynamic():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


def int4(group=16):
    import torchao.quantization as ao

    return TorchAoConfig(ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(group)))


def int4_dynamic(group=16):
    import torchao.quantization as ao

    weights = {"weight_dtype": torch.int4, "weight_granularity": ao.PerGroup(group)}
    return TorchAoConfig(ao.Int8DynamicActivationIntxWeightConfig(**weights))


def nf4(**settings):
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **settings
    )


def nf4_twice():
    return nf4(bnb_4bit_use_double_quant=True)


def llm_int8():
    return BitsAndBytesConfig(load_in_8bit=True)


def with_each(*methods):
    params = [pytest.param(one, marks=QUANTIZERS, id=one.__name__) for one in methods]
    return pytest.mark.parametrize("method", params)


by_method = with_each(int8, int8_dynamic, int4, int4_dynamic, nf4, nf4_twice, llm_int8)
by_library = with_each(int8, nf4)


@pytest.fixture(scope="session")
def narrow(tmp_path_factory):
    """A student whose ranks are multiples of 16."""
    made = tmp_path_factory.mktemp("students") / "llama"
    make_student(rank_multiple=16).save_pretrained(made)
    return made


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """A larger student, whose ranks are multiples of 64."""
    made = tmp_path_factory.mktemp("students") / "wide"
    make_student(rank_multiple=64, **WIDE).save_pretrained(made)
    return made


WIDE = {"hidden_size": 256, "intermediate_size": 256}


@pytest.fixture
def folder(method, narrow, wide):
    """A student that the method can quantize."""
    return wide if method in (nf4, nf4_twice) else narrow


def make_student(seed=0, keep=0.6, hidden_size=64, intermediate_size=128, **settings):
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    teacher = tiny("llama", "causal_lm", seed=seed, **sizes)
    return makd.factorize(teacher, makd.Budget(keep_linears=keep), solver="svd", **settings)


def load(folder, method=None):
    settings = {} if method is None else {"quantization_config": method()}
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


@torch.no_grad()
def logits(model):
    return model(**batch(model)).logits


def factors(model):
    """The linears that factors are."""
    return {
        f"{name}.{part}": module.get_submodule(part)
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
        for part in ("reduce", "expand")
        if part in dict(module.named_children())
    }


@by_method
def test_factors_are_quantized_saved_and_loaded_again_bit_for_bit(method, folder, tmp_path):
    plain, model = load(folder), load(folder, method)
    bits = 4 if "4" in method.__name__ else 8
    error = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < error < {8: 0.08, 4: 0.8}[bits]  # random weights are the worst case: nothing in them is redundant

    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized")

    assert torch.equal(logits(again), logits(model))
    kinds = {name: type(linear.weight) for name, linear in factors(again).items()}
    assert kinds == {name: type(linear.weight) for name, linear in factors(model).items()}
    assert torch.nn.Parameter not in kinds.values()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "quantized/config.json").read_text()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("quantized", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@with_each(int8, int4)
def test_torchaos_codes_are_the_factors_to_half_a_step(method, folder):
    levels = 127 if method is int8 else 7
    for name, linear in factors(load(folder, method)).items():
        plain = load(folder).get_submodule(name).weight
        groups = plain.unflatten(-1, (-1, plain.shape[-1] if method is int8 else 16))
        step = groups.abs().amax(-1, keepdim=True) / levels
        off = (linear.weight.dequantize().unflatten(-1, groups.shape[1:]) - groups).abs()
        assert (off <= 0.51 * step + 1e-7).all()


@with_each(nf4)
def test_nf4s_codes_are_the_nearest_of_its_sixteen_numbers(method, folder):
    from bitsandbytes.functional import dequantize_4bit

    plain = load(folder)
    for name, linear in factors(load(folder, method)).items():
        blocks = plain.get_submodule(name).weight.reshape(-1, 64)  # all sizes here are multiples
        found = dequantize_4bit(linear.weight.data, linear.weight.quant_state).reshape(-1, 64)
        largest = blocks.abs().amax(-1, keepdim=True)
        levels = linear.weight.quant_state.code * largest.unsqueeze(-1)
        assert torch.isclose(found.unsqueeze(-1), levels, atol=1e-6).any(-1).all()
        nearest = (blocks.unsqueeze(-1) - levels).abs().amin(-1)
        assert ((found - blocks).abs() <= nearest + 1e-4 * largest).all()


@by_library
def test_the_files_take_less_room(method, folder, tmp_path):
    load(folder, method).save_pretrained(tmp_path)

    def stored(where):
        """Bytes of all that factors are stored in."""
        tensors = load_file(where / "model.safetensors")
        return sum(tensor.nbytes for name, tensor in tensors.items() if ".reduce." in name or ".expand." in name)

    assert stored(tmp_path) < {"int8": 0.35, "nf4": 0.3}[method.__name__] * stored(folder)


@by_library
def test_it_is_loaded_in_a_new_process_that_does_not_import_makd(method, folder, tmp_path, installed):
    model, saved = load(folder, method), tmp_path / "quantized"
    model.save_pretrained(saved)
    save_file({**batch(model), "logits": logits(model)}, tmp_path / "expected")
    script = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
assert not any(name.split(".")[0] == "makd" for name in sys.modules)
folder, source, saved = sys.argv[1:]
expected = load_file(folder + "/expected")
settings = {} if source == saved else {"quantization_config": BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)}
model = AutoModelForCausalLM.from_pretrained(source, **settings).eval()
with torch.no_grad():
    logits = expected.pop("logits")
    assert torch.equal(model(**expected).logits, logits)
print("the same")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(installed), str(SOURCE)))}
    for source in (saved, folder) if method is nf4 else (saved,):  # quantized already, or to be quantized there
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, (tmp_path, source, saved))],
            capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
        )  # fmt: skip
        assert done.stdout.endswith("the same\n"), done.stderr


@pytest.mark.parametrize("settings", [{"share_input": "always"}, {"vocabulary": "factored"}], ids=str)
@by_library
def test_shared_factors_and_a_factored_vocabulary_go_along(method, settings, tmp_path):
    sizes = {**WIDE, "rank_multiple": 64} if method is nf4 else {}
    make_student(**settings, **sizes).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", method)
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(load(tmp_path / "quantized")), logits(model))


@by_library
def test_shards_and_another_head_are_read_too(method, folder, tmp_path):
    model = load(folder, method)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path)), logits(model))
    base = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        hidden, expected = (one(**batch(model)).last_hidden_state for one in (base, model.model))
    assert torch.equal(hidden, expected)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).num_labels == 3


@with_each(nf4, llm_int8)
def test_what_is_dequantized_is_a_plain_student(method, folder, tmp_path):
    model = load(folder, method)
    model.dequantize()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert {linear.weight.dtype for linear in factors(again).values()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == 4
    assert torch.allclose(logits(makd.fold(again)), logits(again), atol=1e-4)


@with_each(nf4)
def test_adapters_are_trained_on_nf4_factors_which_stay(method, folder, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    model = load(folder, method)
    before = {name: linear.weight.data.clone() for name, linear in factors(model).items()}
    torch.manual_seed(0)
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapted = get_peft_model(prepared, LoraConfig(r=4, target_modules=["reduce", "expand"])).train()
    inputs = batch(model)
    losses = learn(adapted, inputs, 8)
    assert losses[-1] < losses[0] - 0.1

    adapted.eval().save_pretrained(tmp_path)
    after = {name.removeprefix("base_model.model."): one for name, one in adapted.named_modules()}
    assert all(torch.equal(after[name].base_layer.weight.data, codes) for name, codes in before.items())
    again = prepare_model_for_kbit_training(load(folder, method), use_gradient_checkpointing=False)
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path).eval()), logits(adapted))


@by_library
def test_a_part_of_a_matrix_that_is_missing_is_an_error_with_its_name(method, folder, tmp_path):
    load(folder, method).save_pretrained(tmp_path)
    lost = {
        "int8": "model.layers.0.mlp.down_proj.reduce._weight_scale",
        "nf4": "model.layers.0.mlp.down_proj.reduce.weight.quant_state.bitsandbytes__nf4",
    }[method.__name__]
    change(tmp_path, lambda tensors: tensors.pop(lost))
    with pytest.raises(ModelLoadError, match=f"lack '{lost}'"):
        load(tmp_path)


@by_method
def test_a_matrix_that_is_missing_is_an_error_with_its_name(method, folder, tmp_path):
    load(folder, method).save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.q_proj.expand"

    def lose(tensors):
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]

    change(tmp_path, lose)
    with pytest.raises(ModelLoadError, match=f"lack '{name}"):
        load(tmp_path)


@by_method
def test_plain_numbers_where_the_config_says_codes_are_an_error(method, folder, tmp_path):
    load(folder, method).save_pretrained(tmp_path)
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.raises(ModelLoadError, match="says that they are quantized"):
        load(tmp_path)


@by_library
def test_codes_where_the_config_says_plain_numbers_are_an_error(method, folder, tmp_path):
    load(folder, method).save_pretrained(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ModelLoadError):
        load(tmp_path)


@pytest.mark.parametrize("other", [{"seed": 1}, {"keep": 0.8}], ids=str)
@by_method
def test_codes_of_another_student_are_an_error(method, other, folder, tmp_path):
    sizes = {"rank_multiple": 16} if folder.name == "llama" else {**WIDE, "rank_multiple": 64}
    make_student(**other, **sizes).save_pretrained(tmp_path / "other")
    for name, source in (("mine", folder), ("theirs", tmp_path / "other")):
        load(source, method).save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "theirs/model.safetensors", tmp_path / "mine")
    with pytest.raises(ModelLoadError):
        load(tmp_path / "mine")


@with_each(int4, int4_dynamic)
def test_a_group_that_does_not_divide_the_ranks_is_an_error_that_names_the_way_out(method, folder, tmp_path):
    make_student().save_pretrained(tmp_path)  # ranks as they come
    with pytest.raises(UnsupportedModelError, match=r"Groups of 16 do not divide .*`factorize.rank_multiple 16`"):
        load(tmp_path, method)
    load(folder, method)


@with_each(nf4)
def test_rows_that_bitsandbytes_would_read_wrong_on_this_processor_are_an_error(method, narrow, monkeypatch):
    from bitsandbytes.functional import dequantize_4bit

    def takes_wrong_scales(codes, state):
        found = dequantize_4bit(codes, state)
        return found if state.shape[-1] % 64 == 0 else found.roll(1)

    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", takes_wrong_scales)
    with pytest.raises(UnsupportedModelError, match=r"expand has 16 columns.*`factorize.rank_multiple 64`"):
        load(narrow, method)


@by_library
def test_files_that_are_quantized_are_not_quantized_again_in_another_way(method, folder, tmp_path):
    load(folder, method).save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, method)), logits(load(tmp_path)))  # the same way is no other
    with pytest.raises(ModelLoadError, match="quantized already"):
        load(tmp_path, int8_dynamic)


@by_library
def test_codes_are_not_folded(method, folder):
    with pytest.raises(ModelLoadError, match="holds quantized weights"):
        makd.fold(load(folder, method))


@with_each(int8)
def test_experts_stay_as_they_are_and_that_is_told(method, tmp_path, caplog):
    makd.factorize(tiny("mixtral", "causal_lm"), makd.Budget(keep_linears=0.6), solver="svd").save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="makd"):
        model = load(tmp_path, method)
    assert "stacks of experts stay as they are" in caplog.text
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(load(tmp_path / "quantized")), logits(model))


@by_library
def test_models_that_are_no_students_are_quantized_as_ever(method, tmp_path):
    tiny("llama", "causal_lm", **WIDE).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", method)
    model.save_pretrained(tmp_path / "quantized")
    assert json.loads((tmp_path / "quantized/config.json").read_text())["quantization_config"]["quant_method"] != "makd"
    assert torch.equal(logits(load(tmp_path / "quantized")), logits(model))


def change(folder, how):
    """Change the tensors in a folder, and leave what else its file says."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path, metadata=metadata)


class TestWithoutTheLibraries:
    """What is asked of files and configs before anything is quantized."""

    def test_another_method_is_an_error_that_names_those_that_work(self, narrow):
        with pytest.raises(ModelLoadError, match=r"torchao or bitsandbytes.* got a FineGrainedFP8Config"):
            load(narrow, FineGrainedFP8Config)

    def test_two_methods_for_one_model_are_transformers_own_error(self):
        files = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        with pytest.raises(ValueError, match="quantized with BitsAndBytesConfig but you are passing a Fine"):
            AutoHfQuantizer.merge_quantization_configs(files, FineGrainedFP8Config())
        assert AutoHfQuantizer.merge_quantization_configs(files, None).load_in_4bit

    @pytest.mark.parametrize(
        "value", ["int8", {}, {"quant_method": "makd"}, {"quant_method": "of_nobody"}, {"quant_method": "torchao"}]
    )
    def test_a_way_of_quantizing_that_cannot_be_read_is_an_error(self, narrow, tmp_path, value):
        shutil.copytree(narrow, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["quantization"] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelLoadError, match=r"quantization_config\.quantization"):
            load(tmp_path)

    def test_a_plain_student_is_of_a_format_that_older_versions_read(self, narrow):
        told = json.loads((narrow / "config.json").read_text())["quantization_config"]
        assert told["format"] == 4
        assert not {"quantization", "asked"} & told.keys()
