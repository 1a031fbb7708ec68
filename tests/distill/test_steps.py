"""What surrounds a training step: which of torch's attention kernels runs, and that gradients stay what they are."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from makd.distill import SupervisedTrainer
from makd.distill.dropout import switch_dropout_off_
from makd.distill.steps import LONGEST_WRITTEN_OUT, training_step
from tests.distill.test_trainer import make_arguments, make_pair, make_rows, train
from tests.models import tiny

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"
FUSED_BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"


def operations(run):
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    return {event.key for event in recorded.key_averages()}


def fine_tune(folder, **settings):
    rows = make_rows(labels=[0, 1] * 8)
    arguments = make_arguments(folder, max_steps=1, **settings)
    SupervisedTrainer(
        tiny("bert", head="sequence_classification"), args=arguments, train_dataset=rows, dropout=False
    ).train()


def gradients(model, ids, arguments):
    model.zero_grad()
    switch_dropout_off_(model.train())
    with (
        training_step(model, {"input_ids": ids}, arguments, dropout=False),
        torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16),
    ):
        model(input_ids=ids).last_hidden_state.float().square().sum().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("teach", [train, fine_tune])
def test_short_rows_in_bfloat16_on_a_cpu_do_without_the_fused_backward(teach, tmp_path):
    assert FUSED_BACKWARD not in operations(lambda: teach(tmp_path, bf16=True))


def test_accelerates_bfloat16_counts_as_the_arguments_own(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert FUSED_BACKWARD not in operations(lambda: train(tmp_path))


@pytest.mark.parametrize("teach", [train, fine_tune])
def test_float32_keeps_the_fused_kernel(teach, tmp_path):
    assert FUSED_BACKWARD in operations(lambda: teach(tmp_path))


@pytest.mark.parametrize("tokens", [LONGEST_WRITTEN_OUT, LONGEST_WRITTEN_OUT + 1])
def test_long_rows_keep_the_fused_kernel(tokens, tmp_path):
    student = make_pair()[1]
    ids = torch.ones(1, tokens, dtype=torch.long)
    query = torch.randn(1, 2, tokens, 16, dtype=torch.bfloat16)

    def attend():
        with training_step(student, {"input_ids": ids}, make_arguments(tmp_path, bf16=True), dropout=False):
            torch.nn.functional.scaled_dot_product_attention(query, query, query)

    assert (FUSED in operations(attend)) == (tokens > LONGEST_WRITTEN_OUT)


def test_parameters_in_bfloat16_count_as_autocast_does(tmp_path):
    student = make_pair()[1].to(torch.bfloat16)
    ids = torch.randint(5, 60, (2, 12))
    assert FUSED_BACKWARD not in operations(lambda: gradients(student, ids, make_arguments(tmp_path)))


def test_the_gradient_in_bfloat16_is_that_of_float32_but_for_rounding(tmp_path):
    student = make_pair()[1]
    ids = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    exact = gradients(student, ids, make_arguments(tmp_path))
    rounded = gradients(student, ids, make_arguments(tmp_path, bf16=True))
    whole = torch.cat([gradient.flatten() for gradient in exact.values()])
    other = torch.cat([rounded[name].flatten() for name in exact])
    assert torch.linalg.vector_norm(other - whole) < 0.03 * torch.linalg.vector_norm(whole)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    student = make_pair()[1]
    ids = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    arguments = make_arguments(tmp_path, bf16=True)
    plain = gradients(student, ids, arguments)
    student.activation_checkpointing_enable()
    again = gradients(student, ids, arguments)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)
