"""The distillation benchmark holds makd against the same losses: its plain reference is what the trainer minimises."""

from xml.etree import ElementTree

import pytest
from distilling.plot import draw
from distilling.reference import Eager
from torch.testing import assert_close
from transformers import TrainingArguments

import makd
from tests.models import batch, tiny


def pair(name, head, attention):
    """Teacher and student, the same for each implementation of attention."""
    teacher = tiny(name, head, attn_implementation=attention)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd", ranks="uniform")
    return student, teacher


@pytest.mark.parametrize("plan", ["logits", "feature", "full", "balanced", "fast"])
@pytest.mark.parametrize(("name", "head"), [("bert", "base"), ("llama", "causal_lm")])
def test_the_plain_reference_has_the_trainers_loss_and_gradients(name, head, plan, tmp_path):
    student, teacher = pair(name, head, "sdpa")
    inputs = batch(teacher)
    if head == "causal_lm":
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = makd.DistillTrainer(student, teacher, plan, args=arguments)
    ours = trainer.compute_loss(student.train(), inputs)
    ours.backward()
    plain_student, plain_teacher = pair(name, head, "eager")
    plain = Eager(plain_student, plain_teacher, plan).loss(inputs)
    plain.backward()
    assert_close(ours.detach(), plain.detach(), rtol=1e-4, atol=1e-6)
    plain_parameters = dict(plain_student.named_parameters())
    for parameter_name, parameter in student.named_parameters():
        if parameter.grad is not None:
            largest = parameter.grad.abs().max()
            difference = (parameter.grad - plain_parameters[parameter_name].grad).abs().max()
            assert difference <= 1e-3 * largest + 1e-6, parameter_name


def test_a_plot_is_well_formed_and_has_every_line(tmp_path):
    lines = {"makd full": [(128, 0.1), (512, 0.5)], "eager & dense": [(128, 0.2), (512, 3.0)]}
    draw([("Time", "seconds", lines)], "tokens", tmp_path / "plot.svg")
    texts = {element.text for element in ElementTree.parse(tmp_path / "plot.svg").iter() if element.text}
    assert {"makd full", "eager & dense", "tokens", "seconds", "128", "512"} <= texts
