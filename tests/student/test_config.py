"""A student's config that was changed by hand is refused with what is wrong in it, and nothing of it is ignored."""

import json
import re

import pytest
from transformers import AutoModel, AutoModelForCausalLM

import makd
from makd.errors import ModelLoadError
from makd.loading import load_model
from makd.student.config import StudentConfig
from tests.models import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    student = makd.factorize(tiny("bert"), makd.Budget(keep_linears=0.5), solver="svd", share_input="always")
    student.save_pretrained(folder)
    return folder


@pytest.fixture
def changed(saved, tmp_path):
    """A folder whose quantization_config was changed by a function."""

    def change(how):
        for file in saved.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((saved / "config.json").read_text())
        how(config["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return change


def first(mapping):
    return next(iter(mapping))


def put(**values):
    return lambda config: config.update(values)


def without(key):
    return lambda config: config.pop(key)


def rank(value):
    return lambda config: config["ranks"].update({first(config["ranks"]): value})


def renamed(config):
    config["ranks"]["encoder.layer.7.output.dense"] = config["ranks"].pop("encoder.layer.1.output.dense")


BROKEN = {
    "unknown key": (put(rank=8), "Unknown key of quantization_config 'rank'. Did you mean 'ranks'"),
    "no ranks": (without("ranks"), "lacks 'ranks'"),
    "no parameters": (without("parameters"), "lacks 'parameters'"),
    "no architecture": (without("architecture"), "lacks 'architecture'"),
    "no format": (without("format"), "lacks 'format'"),
    "no identity": (without("identity"), "lacks 'identity'"),
    "identity a number": (put(identity=7), "identity is sixteen hexadecimal digits"),
    "identity too short": (put(identity="abc"), "identity is sixteen hexadecimal digits"),
    "ranks a list": (put(ranks=[8, 8]), "ranks is names of linears with their ranks"),
    "ranks null": (put(ranks=None), "ranks is names of linears with their ranks"),
    "a rank in words": (rank("8"), "ranks is names of linears with their ranks"),
    "a rank with a comma": (rank(8.5), "ranks is names of linears with their ranks"),
    "a rank true": (rank(True), "ranks is names of linears with their ranks"),
    "a rank of 0": (rank(0), "ranks is names of linears with their ranks"),
    "a rank below 0": (rank(-1), "ranks is names of linears with their ranks"),
    "a rank above the matrix": (rank(10**6), "rank 1000000; it is a matrix of 32 x 32"),
    "a layer that is not there": (renamed, "no such linear"),
    "embeddings a list": (put(embeddings=["x"]), "embeddings is names of embeddings"),
    "embeddings false": (put(embeddings=False), "embeddings is names of embeddings"),
    "dropped a number": (put(dropped=2), "dropped is names of layers"),
    "dropped below 0": (put(dropped={"encoder.layer.0": -1}), "dropped is names of layers"),
    "shared a name": (put(shared={"a": "b"}), "shared is names of linears with lists"),
    "shared without a rank": (put(shared={"a": ["b"]}), "shared names 'a', which has no rank"),
    "parameters a number": (put(parameters=10), "parameters is total, factored, vocabulary"),
    "parameters without one": (put(parameters={"total": 1}), "parameters lacks 'factored'"),
    "parameters in words": (put(parameters={"total": "1", "factored": 1, "vocabulary": 1}), "parameters is total"),
    "architecture a number": (put(architecture=3), "architecture is the name of a model's class"),
    "format in words": (put(format="4"), "format is a number from 1 on"),
    "format 0": (put(format=0), "format is a number from 1 on"),
    "format null": (put(format=None), "format is a number from 1 on"),
    "format of tomorrow": (put(format=99), "Update makd"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_is_refused_by_what_is_wrong(name, changed):
    how, text = BROKEN[name]
    folder = changed(how)
    for load in (AutoModel.from_pretrained, load_model):
        with pytest.raises(ModelLoadError, match=re.escape(text)):
            load(str(folder))


def test_what_is_written_is_read_again(saved):
    written = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert StudentConfig.from_dict(written).to_dict() == written


@pytest.mark.parametrize("value", [None, "makd", ["makd"], {}, {"quant_method": "mkad"}], ids=str)
def test_weights_of_a_student_with_the_config_of_none_are_refused(saved, tmp_path, value):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = value
    if value is None:
        del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="quantization_config"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["Trainer", "GPT2Model", "NoModel", ""])
def test_a_class_that_is_none_of_this_model_is_refused(saved, tmp_path, name):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    with pytest.raises(ModelLoadError, match=f"is a {name}, which transformers has not for model type 'bert'"):
        AutoModel.from_pretrained(tmp_path)


@pytest.fixture
def shards(tmp_path):
    student = makd.factorize(tiny("llama", "causal_lm"), makd.Budget(keep_linears=0.5), solver="svd")
    student.save_pretrained(tmp_path / "student", max_shard_size="10KB")
    return tmp_path / "student"


def out_of_the_folder(index, folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.rename(folder.parent / "x.safetensors")
    for name, where in index["weight_map"].items():
        if where == file.name:
            index["weight_map"][name] = "../x.safetensors"
    return index


def absolute(index, folder):
    return {**index, "weight_map": {name: str(folder / file) for name, file in index["weight_map"].items()}}


def of_another_kind(index, folder):
    return {**index, "weight_map": dict.fromkeys(index["weight_map"], "weights.bin")}


def not_there(index, folder):
    return {**index, "weight_map": dict.fromkeys(index["weight_map"], "other.safetensors")}


INDEXES = {
    "out of the folder": (out_of_the_folder, "outside its folder"),
    "absolute": (absolute, "outside its folder"),
    "of another kind": (of_another_kind, "names weights.bin, which does not exist"),
    "not there": (not_there, "names other.safetensors, which does not exist"),
    "without weight_map": (lambda index, folder: {"metadata": {}}, "says under `weight_map`"),
    "weight_map a list": (lambda index, folder: {"weight_map": ["x"]}, "says under `weight_map`"),
    "a list": (lambda index, folder: [], "holds an object"),
    "files that are numbers": (lambda index, folder: {"weight_map": {"x": 1}}, "says under `weight_map`"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_broken_index_is_refused_by_what_is_wrong(name, shards):
    how, text = INDEXES[name]
    path = shards / "model.safetensors.index.json"
    path.write_text(json.dumps(how(json.loads(path.read_text()), shards)))
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(ModelLoadError, match=re.escape(text)):
            load(str(shards))


def test_an_index_that_is_not_json_is_refused(shards):
    (shards / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelLoadError, match="is damaged: it is not JSON"):
        AutoModelForCausalLM.from_pretrained(shards)
