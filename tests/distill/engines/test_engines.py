"""What engines need to be told, and what is refused before there is a training."""

import copy
import tempfile

import pytest
import torch
from accelerate import dispatch_model

import makd
from makd.ablation import ablate
from makd.distill import DistillTrainer, SupervisedTrainer
from makd.distill.engines.support import check_shared
from makd.errors import SettingError
from makd.pipeline import distill
from tests.distill.test_trainer import make_arguments, make_pair
from tests.models import batch, tiny
from tests.two_devices import TwoDevices, spread_

PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def spread(*on_disk):
    """A teacher, with some of its modules on disk."""
    places = PLACES | dict.fromkeys(on_disk, "disk")
    folder = tempfile.mkdtemp()
    return dispatch_model(
        tiny("llama", head="causal_lm"), places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def loss_with(teacher, folder):
    student = makd.factorize(tiny("llama", head="causal_lm"), makd.Budget(keep_linears=0.5), solver="svd")
    trainer = makd.DistillTrainer(copy.deepcopy(student), teacher, "full", args=make_arguments(folder))
    inputs = batch(trainer.model)
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model.train(), {**inputs, "labels": inputs["input_ids"]}))


@pytest.mark.parametrize("on_disk", [["model.layers.1"], ["model.layers.0", "model.layers.1"], ["model.embed_tokens"]])
def test_a_teacher_that_is_partly_on_disk_teaches_the_same(on_disk, tmp_path):
    assert loss_with(spread(*on_disk), tmp_path) == loss_with(tiny("llama", head="causal_lm"), tmp_path)


def test_a_teacher_whose_head_is_on_disk_is_refused(tmp_path):
    with pytest.raises(SettingError, match="The head of LlamaForCausalLM is offloaded"):
        loss_with(spread("lm_head"), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_teacher_that_is_spread_over_devices_teaches_the_same(tied, tmp_path):
    def teacher():
        return tiny("llama", head="causal_lm", tie_word_embeddings=tied)

    student = makd.factorize(teacher(), makd.Budget(keep_linears=0.5), solver="svd")

    def loss(teacher):
        trainer = makd.DistillTrainer(copy.deepcopy(student), teacher, "full", args=make_arguments(tmp_path))
        inputs = batch(student)
        inputs["labels"] = inputs["input_ids"]
        trainer.teacher_variances.measure([inputs], trainer.anatomy, trainer._recorded, torch.device("cpu"))
        with torch.no_grad():
            return float(trainer.compute_loss(trainer.model.train(), inputs))

    expected = loss(teacher())
    with TwoDevices():
        # a tied head is where the embeddings are, and the norm before it is not
        spread_over_two = spread_(teacher(), "model.layers.1", "model.norm", *([] if tied else ["lm_head"]))
        assert loss(spread_over_two) == expected


def test_sharding_that_accelerate_does_not_do_here_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingError, match="FSDP is asked for"):
        makd.DistillTrainer(tiny("bert"), tiny("bert"), args=make_arguments(tmp_path))


def test_a_fine_tuning_is_not_sharded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingError, match="FSDP is asked for"):
        makd.finetune("anything", makd.TaskConfig(name="glue/mrpc", path=str(tmp_path)), output=tmp_path / "out")


@pytest.mark.parametrize("launched", [None, "no", "bf16", "fp16"])
@pytest.mark.parametrize(("precision", "meant"), [("float32", "no"), ("bfloat16", "bf16")])
def test_a_training_has_the_precision_of_its_settings_or_is_refused(tmp_path, monkeypatch, launched, precision, meant):
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    training = makd.TrainingConfig(precision=precision)
    if meant == "no" and launched not in (None, "no"):
        with pytest.raises(SettingError, match=f"is float32, and accelerate was told to mix it with {launched}"):
            training.to_arguments(tmp_path, 0, True)
    else:
        trainer = DistillTrainer(tiny("bert"), tiny("bert"), args=training.to_arguments(tmp_path, 0, True))
        assert trainer.accelerator.mixed_precision == meant


@pytest.mark.parametrize(
    "begin",
    [
        lambda: makd.compress("nowhere", ["A text."], makd.Budget(keep_linears=0.5)),
        lambda: distill("nowhere", "nowhere", ["A text."]),
        lambda: makd.finetune("nowhere", makd.TaskConfig(name="glue/mrpc", path="nowhere")),
    ],
    ids=["compress", "distill", "finetune"],
)
def test_another_precision_of_the_launcher_is_told_before_anything_is_read(monkeypatch, begin):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(SettingError, match="accelerate was told"):
        begin()


def test_a_teacher_is_not_sharded_without_fsdp(tmp_path):
    with pytest.raises(SettingError, match="teacher is to be sharded"):
        makd.DistillTrainer(tiny("bert"), tiny("bert"), args=make_arguments(tmp_path), shard_teacher=True)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_weights_that_two_stacks_share_are_not_sharded(name):
    with pytest.raises(SettingError, match="share one"):
        check_shared(tiny(name, head="seq2seq_lm"))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_embeddings_that_a_head_shares_are(name):
    model = tiny(name, head="causal_lm" if name != "bert" else "masked_lm")
    check_shared(model)


def taught(arguments):
    student, teacher = make_pair()
    return DistillTrainer(student, teacher, args=arguments)


def fine_tuned(arguments):
    return SupervisedTrainer(tiny("bert", head="sequence_classification"), args=arguments)


@pytest.mark.parametrize("begin", [taught, fine_tuned])
def test_one_process_takes_one_of_several_gpus(begin, tmp_path, caplog):
    arguments = make_arguments(tmp_path)
    arguments.__dict__["_n_gpu"] = 4
    assert arguments.n_gpu == 4
    trainer = begin(arguments)
    assert trainer.args.n_gpu == 1
    assert arguments.n_gpu == 4, "they may be another trainer's, too"
    assert "torchrun --nproc-per-node 4" in caplog.text


@pytest.mark.parametrize("begin", [taught, fine_tuned])
def test_one_process_takes_one_of_several_gpus_without_arguments_too(begin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    trainer = begin(None)
    assert (trainer.args.n_gpu, trainer.args.ddp_find_unused_parameters) == (1, True)
    assert trainer.args.train_batch_size == trainer.args.per_device_train_batch_size


TEXTS = [f"The list number {number} is a sequence of names." for number in range(20)]


def begin(folder, tmp_path, told, **settings):
    training = makd.TrainingConfig(**{"steps": 1, "batch_size": 4, **settings})
    evaluation = makd.EvaluationConfig(latency=False)
    recipe = makd.Recipe(training=training, evaluation=evaluation, device="cpu", plan=makd.Plan(preset="fast"))
    budget = makd.Budget(keep_linears=0.5)
    makd.compress(str(folder), TEXTS, budget, recipe, tmp_path / "out", on_progress=lambda one: told.append(one.what))


@pytest.mark.parametrize("name", ["mpnet", "albert"])
def test_layers_that_are_not_computed_again_are_told_before_the_work(name, tokenizer, tmp_path):
    model, told = tiny(name, vocab_size=300, max_position_embeddings=130), []
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(SettingError, match=r"gradient_checkpointing is true, and .* cannot compute its layers again"):
        begin(tmp_path / "teacher", tmp_path, told, gradient_checkpointing=True)
    assert set(told) == {"load"}
    arguments = makd.TrainingConfig(gradient_checkpointing=True).to_arguments(tmp_path, 0, True)
    with pytest.raises(SettingError, match="cannot compute its layers again"):
        DistillTrainer(model, tiny(name), args=arguments)
    with pytest.raises(SettingError, match="cannot compute its layers again"):
        SupervisedTrainer(model, args=arguments)


def test_a_teacher_that_nothing_shards_is_told_before_the_work(encoder_folder, tmp_path):
    told = []
    with pytest.raises(SettingError, match="teacher is to be sharded"):
        begin(encoder_folder, tmp_path, told, shard_teacher=True)
    assert set(told) == {"load"}


def test_sharding_on_a_cpu_is_told_before_the_work(encoder_folder, tmp_path, monkeypatch):
    told = []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingError, match=r"FSDP is asked for, and this run is on the CPU: accelerate shards on GPUs"):
        begin(encoder_folder, tmp_path, told)
    assert set(told) == {"load"}


def test_a_cache_is_no_ablations(encoder_folder, tmp_path):
    with pytest.raises(SettingError, match="a cache is of the rows that one seed takes"):
        ablate(str(encoder_folder), TEXTS, makd.Budget(keep=0.5), makd.Recipe(cache="caches/x"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
