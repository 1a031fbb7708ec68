"""Students with factored experts are taught like any other: by the Trainer, layer by layer, and from several sides."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

import makd
from makd.distill import LayerTeacher, LayerwiseConfig
from makd.student.experts import FactoredStack
from tests.models import batch, tiny


def stacks_of(model):
    return [module for module in model.modules() if isinstance(module, FactoredStack)]


def divergence(student, teacher, inputs):
    with torch.no_grad():
        found, expected = (torch.log_softmax(model(**inputs).logits, -1) for model in (student, teacher))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_training_from_several_sides_brings_predictions_nearer_and_moves_all_experts(name, tmp_path):
    teacher = tiny(name, "causal_lm")
    rows = [batch(teacher, padded=False, seed=seed) for seed in range(4)]
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="two_sided", calibration=rows)
    before, start = divergence(student, teacher, rows[0]), copy.deepcopy(student.state_dict())
    arguments = TrainingArguments(
        tmp_path, max_steps=12, learning_rate=5e-4, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": ids.tolist()} for one in rows for ids in one["input_ids"]])
    makd.DistillTrainer(student, teacher, "full", args=arguments, train_dataset=data).train()
    assert divergence(student, teacher, rows[0]) < before
    moved = {key for key, value in student.state_dict().items() if not torch.equal(value, start[key])}
    for path, module in student.named_modules():
        if isinstance(module, FactoredStack):
            assert {f"{path}.reduce.weight", f"{path}.expand.weight"} <= moved


def test_layers_with_experts_may_be_taught_while_the_student_is_made():
    teacher = tiny("mixtral", "causal_lm")
    rows = [batch(teacher, padded=False, seed=seed) for seed in range(6)]
    settings = LayerwiseConfig(steps=12, learning_rate=5e-3, evaluate_every=6, held_out_every=3)
    plan = makd.Plan(terms=(makd.Term(aspect="hidden"),))
    student = makd.factorize(
        teacher, makd.Budget(keep_linears=0.5), solver="svd", calibration=rows, teach=LayerTeacher(plan, settings)
    )
    lessons = student.factorization.lessons
    assert lessons.keys() == {0, 1}
    assert all(lesson["after"] < lesson["before"] for lesson in lessons.values())
    assert stacks_of(student)
