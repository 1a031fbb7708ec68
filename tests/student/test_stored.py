"""Weights that are not those of the config are refused; those of a student that its user went on with are not."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import makd
from makd.errors import ModelLoadError
from makd.student.hub import mark_student
from tests.models import batch, tiny


def make_student(name="bert", head="base", seed=0, **settings):
    return makd.factorize(tiny(name, head, seed=seed), makd.Budget(keep_linears=0.5), solver="svd", **settings)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.LayerNorm.weight",
        "encoder.layer.0.output.LayerNorm.bias",
        "embeddings.word_embeddings.weight",
        "pooler.dense.weight",
        "encoder.layer.1.intermediate.dense.weight",  # the identity there
    ],
)
@pytest.mark.parametrize("load", [AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("what", ["missing", "renamed"])
def test_a_tensor_that_is_missing_or_renamed_is_an_error_with_its_name(name, load, what, tmp_path):
    make_student().save_pretrained(tmp_path)

    def change(tensors):
        tensor = tensors.pop(name)
        if what == "renamed":
            tensors[f"old_{name}"] = tensor

    change_weights(tmp_path, change)
    lost = name.replace("intermediate.dense.weight", "intermediate.dense.identity")
    with pytest.raises(ModelLoadError, match=f"lack '{lost}'"):
        load.from_pretrained(tmp_path)


def test_a_head_that_was_saved_is_missed_and_a_new_one_is_not(tmp_path):
    make_student(head="masked_lm").save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.pop("cls.predictions.transform.dense.weight"))
    with pytest.raises(ModelLoadError, match=r"lack 'cls\.predictions\.transform\.dense\.weight'"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)
    make_student().save_pretrained(tmp_path / "base")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).num_labels == 3


@pytest.mark.parametrize("settings", [{}, {"share_input": "always"}, {"vocabulary": "factored"}], ids=str)
def test_weights_of_another_student_of_the_same_shapes_are_refused(settings, tmp_path):
    make_student(seed=0, **settings).save_pretrained(tmp_path / "one")
    make_student(seed=1, **settings).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "one")
    with pytest.raises(ModelLoadError, match="of different students"):
        AutoModel.from_pretrained(tmp_path / "one")


def test_weights_of_the_same_student_before_and_after_training_are_told_apart(tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        student.encoder.layer[0].output.dense.expand.weight.mul_(1.01)
    mark_student(student)
    student.save_pretrained(tmp_path / "after")
    shutil.copy(tmp_path / "after" / "model.safetensors", tmp_path / "before")
    with pytest.raises(ModelLoadError, match="of different students"):
        AutoModel.from_pretrained(tmp_path / "before")


def test_the_dense_weights_of_the_teacher_are_refused(tmp_path):
    make_student().save_pretrained(tmp_path)
    tiny("bert").save_pretrained(tmp_path / "teacher")
    shutil.copy(tmp_path / "teacher" / "model.safetensors", tmp_path)
    with pytest.raises(ModelLoadError, match="hold 0 parameters of factored linears"):
        AutoModel.from_pretrained(tmp_path)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    make_student().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match="is not whole"):
        AutoModel.from_pretrained(tmp_path)


class TestAUserWhoGoesOn:
    def test_saves_what_was_trained_and_loads_it(self, tmp_path):
        make_student().save_pretrained(tmp_path / "one")
        model = AutoModel.from_pretrained(tmp_path / "one")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        model.save_pretrained(tmp_path / "two")
        assert makd.fingerprint(AutoModel.from_pretrained(tmp_path / "two")) == makd.fingerprint(model)

    def test_saves_under_another_head_and_loads_under_each(self, tmp_path):
        make_student().save_pretrained(tmp_path / "one")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one", num_labels=3)
        model.save_pretrained(tmp_path / "two")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two")
        assert makd.fingerprint(again) == makd.fingerprint(model)
        assert makd.fingerprint(AutoModel.from_pretrained(tmp_path / "two")) == makd.fingerprint(model.bert)

    def test_puts_a_student_into_a_model_of_his_own(self, tmp_path):
        make_student().save_pretrained(tmp_path / "one")
        base = AutoModel.from_pretrained(tmp_path / "one")
        model = AutoModelForSequenceClassification.from_config(base.config).eval()
        model.bert = base
        model.save_pretrained(tmp_path / "two")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two")
        assert makd.fingerprint(again) == makd.fingerprint(model)

    def test_loads_weights_from_memory_into_another_student(self, tmp_path):
        one, other = make_student(seed=0), make_student(seed=1)
        one.load_state_dict(other.state_dict())
        one.save_pretrained(tmp_path)
        assert makd.fingerprint(AutoModel.from_pretrained(tmp_path)) == makd.fingerprint(other)

    def test_loads_a_file_as_torch_does(self, tmp_path):
        student = make_student()
        student.save_pretrained(tmp_path)
        other = make_student(seed=1)
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert makd.fingerprint(other) == makd.fingerprint(student)

    def test_resizes_the_vocabulary(self, tmp_path):
        student = make_student(head="masked_lm")
        student.resize_token_embeddings(70, mean_resizing=False)
        student.save_pretrained(tmp_path)
        assert makd.fingerprint(AutoModelForMaskedLM.from_pretrained(tmp_path)) == makd.fingerprint(student)

    def test_trains_with_checkpoints_that_load_and_resume_bit_for_bit(self, tmp_path):
        make_student().save_pretrained(tmp_path / "student")
        inputs = batch(tiny("bert"))
        rows = [{**{key: value[row] for key, value in inputs.items()}, "labels": row % 2} for row in range(4)]

        def train(output, steps, resume):
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student", num_labels=2)
            arguments = TrainingArguments(
                str(output), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                learning_rate=1e-2, lr_scheduler_type="constant", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            arguments.max_steps = steps
            trainer = Trainer(model, arguments, train_dataset=rows)
            trainer.train(resume_from_checkpoint=resume)
            return model.eval()

        whole = train(tmp_path / "whole", 4, None)
        half = train(tmp_path / "half", 2, None)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half" / "checkpoint-2")
        assert makd.fingerprint(loaded) == makd.fingerprint(half)
        resumed = train(tmp_path / "half", 4, str(tmp_path / "half" / "checkpoint-2"))
        assert makd.fingerprint(resumed) == makd.fingerprint(whole) != makd.fingerprint(half)


def test_the_identity_is_in_the_config_and_in_every_stand_in(tmp_path):
    make_student().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    tensors = load_file(tmp_path / "model.safetensors")
    found = {f"{int(tensors[f'{name}.weight']):016x}" for name in config["ranks"]}
    assert found == {config["identity"]}


@pytest.mark.parametrize("load", [AutoModelForCausalLM, AutoModel])
def test_tied_factors_may_be_saved_under_each_of_their_names(load, tmp_path):
    """As in a state dict that FSDP or DeepSpeed put together."""
    teacher = tiny("llama", "causal_lm", vocab_size=2000, tie_word_embeddings=True)
    student = makd.factorize(teacher, makd.Budget(keep=0.4), solver="svd", vocabulary="factored")
    student.save_pretrained(tmp_path, state_dict={name: one.clone() for name, one in student.state_dict().items()})
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert {"lm_head.expand.weight", "model.embed_tokens.table.weight"} <= set(saved.keys())
    loaded, wanted = load.from_pretrained(tmp_path), student if load is AutoModelForCausalLM else student.model
    assert makd.fingerprint(loaded) == makd.fingerprint(wanted)
