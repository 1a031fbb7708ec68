"""Students with factored experts are taught like any other: by the Trainer, layer by layer, and from several sides."""

import copy
from contextlib import ExitStack

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


EXPERTS = makd.Plan(terms=(makd.Term(aspect="experts"),))


def make_trainer(folder, name, plan=EXPERTS):
    """Of a teacher and its student with half of the linears."""
    teacher = tiny(name, "causal_lm")
    rows = [batch(teacher, padded=False, seed=seed) for seed in range(2)]
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="two_sided", calibration=rows)
    arguments = TrainingArguments(folder, max_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False)
    data = Dataset.from_list([{"input_ids": ids.tolist()} for one in rows for ids in one["input_ids"]])
    return makd.DistillTrainer(student, teacher, plan, args=arguments, train_dataset=data)


def outputs_of(model, inputs, ends):
    """What the modules whose names end so give, (tokens, hidden)."""
    found = {}

    def note(name):
        def hook(_module, _inputs, output):
            found[name] = (output[0] if isinstance(output, tuple) else output).flatten(0, -2).double()

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(ends):
                hooks.callback(module.register_forward_hook(note(name)).remove)
        model(**inputs)
    return found


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("mixtral", ("0.mlp", "1.mlp")), ("gpt_oss", ("0.mlp", "1.mlp")), ("deepseek_v3", ("1.mlp",)),
     ("llama4", ("0.feed_forward", "1.feed_forward"))],
)  # fmt: skip
def test_experts_are_compared_by_what_a_layers_mixture_gives_with_the_shared_one(name, blocks, tmp_path):
    trainer = make_trainer(tmp_path, name)
    inputs = batch(trainer.model)
    real = inputs["attention_mask"].flatten().bool()
    ours, theirs = (outputs_of(model.eval(), inputs, blocks) for model in (trainer.model, trainer.teacher))
    parts = [
        (ours[block][real] - theirs[block][real]).square().mean() / theirs[block][real].var(0, correction=0).mean()
        for block in theirs
    ]
    assert len(parts) == len(blocks)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    torch.testing.assert_close(loss.double(), torch.stack(parts).mean(), rtol=1e-5, atol=0)
    loss.backward()
    assert all(stack.expand.weight.grad is not None for stack in stacks_of(trainer.model))


def test_a_model_without_experts_is_told_of_the_term_that_does_not_apply(tmp_path):
    with pytest.raises(makd.MakdError, match="asks for 'experts', but none of the chosen layers has it"):
        make_trainer(tmp_path, "llama")


def test_layers_without_experts_have_nothing_to_compare(tmp_path):
    term = makd.Term(aspect="experts", layers=[0])
    with pytest.raises(makd.MakdError, match="asks for 'experts', but none of the chosen layers has it"):
        make_trainer(tmp_path, "deepseek_v3", makd.Plan(terms=(term,)))
