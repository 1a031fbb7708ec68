"""From a name to a model: what is understood, and what is refused with a word that helps."""

import shutil

import pytest
import torch

import makd
from makd.loading import load_model, load_tokenizer, locate


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
    with pytest.raises(makd.MakdError, match="No model could be loaded"):
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
