"""A PeftModel as student or teacher: it is compared with its adapters, which alone learn and are saved."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

import makd
from makd.distill import DistillTrainer
from makd.errors import SettingError
from tests.distill.test_trainer import make_arguments, make_rows, train
from tests.models import batch, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),
]


def make_student(teacher, **settings):
    return makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd", **settings)


def adapt(model, targets="all-linear", **settings):
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": makd.adapter_targets(model, targets), **settings}
    return get_peft_model(model, LoraConfig(**settings))


def fill_(adapted):
    """Something in the place of what adapters begin with, which is nothing."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=generator)


def losses(student, teacher, folder, plan="full", rows=None):
    trainer = DistillTrainer(
        model=student, teacher=teacher, plan=plan, args=make_arguments(folder), eval_dataset=rows or make_rows(4)
    )
    return trainer.evaluate()


def numbers(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A student that learned by adapters in eight steps, with what it was before; checkpoints of the way."""
    folder = tmp_path_factory.mktemp("taught")
    teacher = tiny("qwen2", "causal_lm")
    student = make_student(teacher)
    student.save_pretrained(folder / "student")
    student = type(student).from_pretrained(folder / "student")
    adapted = adapt(student, task_type="CAUSAL_LM")
    before = numbers(adapted)
    trainer = train(
        folder / "run", adapted, teacher, max_steps=8, learning_rate=1e-2, save_strategy="steps", save_steps=4
    )
    return folder, teacher, trainer, before


def test_adapters_alone_learn(taught):
    _, _, trainer, before = taught
    after = numbers(trainer.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "lora_" in name
    }
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < 0.9 * history[0]


def test_checkpoints_and_saved_models_hold_adapters_alone_and_load_as_such(taught, tmp_path):
    folder, _, trainer, _ = taught
    trainer.save_model(str(tmp_path))
    for place in (tmp_path, folder / "run" / "checkpoint-8"):
        assert all("lora_" in name for name in load_file(place / "adapter_model.safetensors"))
        assert not list(place.glob("model*.safetensors"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "student")
    student = type(trainer.distillation_forward.student).from_pretrained(folder / "student")
    loaded = PeftModel.from_pretrained(student, tmp_path)
    inputs = batch(student)
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, rtol=1e-3, atol=1e-4)


def test_a_training_goes_on_from_a_checkpoint_to_the_same_adapters(taught, tmp_path):
    folder, teacher, trainer, _ = taught
    student = type(trainer.distillation_forward.student).from_pretrained(folder / "student")
    resumed = DistillTrainer(
        model=adapt(student, task_type="CAUSAL_LM"),
        teacher=teacher,
        args=make_arguments(tmp_path, max_steps=8, learning_rate=1e-2),
        train_dataset=make_rows(),
    )
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-4"))
    ours, theirs = numbers(trainer.model), numbers(resumed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_learns_what_adapters_in_the_model_itself_learn(tmp_path):
    teacher = tiny("bert")
    wrapped = adapt(make_student(teacher), task_type="FEATURE_EXTRACTION")
    inside = copy.deepcopy(wrapped).get_base_model()
    train(tmp_path / "wrapped", wrapped, teacher)
    train(tmp_path / "inside", inside, teacher)
    ours, theirs = numbers(wrapped.get_base_model()), numbers(inside)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("wrapped", ["student", "teacher"])
@pytest.mark.parametrize(
    ("name", "head", "targets", "settings"),
    [
        ("bert", "base", "all-linear", {}),
        ("bert", "base", ["dense", "query"], None),
        ("qwen2", "causal_lm", ["v_proj", "lm_head"], {}),
        ("qwen2", "causal_lm", ["v_proj", "lm_head"], {"vocabulary": "factored"}),
        ("arcee", "causal_lm", "all-linear", None),
        ("t5", "seq2seq_lm", "all-linear", {"share_input": "always"}),
    ],
    ids=str,
)
def test_beside_itself_with_the_adapters_merged_there_is_nothing_to_learn(
    name, head, targets, settings, wrapped, tmp_path
):
    """Every aspect hears what adapters add, on factors, dense linears and heads."""
    model = tiny(name, head)
    model = model if settings is None else make_student(model, **settings)
    adapted = adapt(model, targets, init_lora_weights=False)
    merged = copy.deepcopy(adapted).merge_and_unload()
    rows = make_rows(4)
    if name == "t5":
        rows = rows.add_column("labels", rows["input_ids"])
    pair = (adapted, merged) if wrapped == "student" else (merged, adapted)
    found = losses(*pair, tmp_path, rows=rows)
    compared = {name: loss for name, loss in found.items() if name in {"eval_matrix", "eval_hidden", "eval_logits"}}
    assert len(compared) >= 2
    assert max(compared.values()) < 1e-5
    with adapted.disable_adapter():
        assert losses(*pair, tmp_path, rows=rows)["eval_hidden"] > 1e-3


@pytest.mark.parametrize("vocabulary", ["dense", "factored"])
def test_a_head_whose_adapter_begins_with_nothing_is_heard_when_it_has_learned(vocabulary, tmp_path):
    student = make_student(tiny("qwen2", "causal_lm"), vocabulary=vocabulary)
    adapted = adapt(student, ["lm_head"])
    learned = copy.deepcopy(adapted)
    fill_(learned)
    trainer = DistillTrainer(
        model=adapted,
        teacher=learned.merge_and_unload(),
        plan=makd.Plan(terms=(makd.Term(aspect="logits"),)),
        args=make_arguments(tmp_path),
        eval_dataset=make_rows(4),
    )
    assert trainer.evaluate()["eval_logits"] > 1e-3
    fill_(adapted)
    assert trainer.evaluate()["eval_logits"] < 1e-5


def test_adapters_before_the_tokens_are_refused(tmp_path):
    teacher = tiny("qwen2", "causal_lm")
    prompted = get_peft_model(make_student(teacher), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(SettingError, match="The student has adapters of the kind PROMPT_TUNING"):
        losses(prompted, teacher, tmp_path)
    with pytest.raises(SettingError, match="The teacher has adapters of the kind PROMPT_TUNING"):
        losses(make_student(teacher), prompted, tmp_path)


def test_a_mixture_of_adapters_is_refused(tmp_path):
    teacher = tiny("bert")
    student = make_student(teacher)
    mixed = PeftMixedModel(student, LoraConfig(r=2, target_modules=makd.adapter_targets(student)))
    with pytest.raises(SettingError, match="The student is a PeftMixedModel"):
        losses(mixed, teacher, tmp_path)


def test_projections_that_no_checkpoint_would_hold_are_refused(tmp_path):
    student = adapt(tiny("bert", hidden_size=16, intermediate_size=32))
    with pytest.raises(SettingError, match="a PeftModel's checkpoints hold adapters alone"):
        losses(student, tiny("bert"), tmp_path, plan=makd.Plan(terms=(makd.Term(aspect="hidden"),)))


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (lambda model: torch.compile(model, backend="eager"), "OptimizedModule.* as torch.compile was given it"),
        (torch.nn.DataParallel, "DataParallel.* Give the model of transformers itself"),
        (lambda model: torch.nn.Linear(2, 2), "Linear.* Give the model of transformers itself"),
    ],
    ids=["compiled", "in parallel", "no model"],
)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_what_is_no_model_of_transformers_is_refused(tmp_path, wrap, told, whose):
    pair = {"student": tiny("bert"), "teacher": tiny("bert")}
    pair[whose] = wrap(pair[whose])
    with pytest.raises(SettingError, match=f"The {whose} is of the class {told}"):
        DistillTrainer(pair["student"], pair["teacher"], args=make_arguments(tmp_path))
