"""logits_divergence and regression_mse against their definitions in float64."""

import logging

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from makd.aspects import logits, logits_divergence, regression_mse

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 1]]).bool()


def reference(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    rows = []
    for row, token in mask.nonzero().tolist():
        log_s = (student[row, token].double() / temperature).log_softmax(-1)
        log_t = (teacher[row, token].double() / temperature).log_softmax(-1)
        rows.append((log_t.exp() * (log_t - log_s)).sum() * temperature**2)
    return torch.stack(rows).mean()


def pair(vocabulary: int = 50, teacher_vocabulary: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 4, vocabulary, generator=generator) * 3
    teacher = torch.randn(3, 4, teacher_vocabulary or vocabulary, generator=generator) * 3
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("chunk", [1, 120, 2**20], ids=["a row", "two rows", "all"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("masked", [True, False])
def test_value_and_gradient_agree_with_the_definition(temperature, chunk, masked, monkeypatch):
    monkeypatch.setattr(logits, "_CHUNK_ELEMENTS", chunk)
    student, teacher = pair()
    got = logits_divergence(student, teacher, MASK if masked else None, temperature)
    expected = reference(student, teacher, MASK if masked else torch.ones_like(MASK), temperature)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    (slope,), (wanted,) = torch.autograd.grad(got, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=1e-8)


def test_gradient_is_the_value_s_numerical_derivative():
    student, teacher = (tensor.detach().double() for tensor in pair(5))
    torch.autograd.gradcheck(lambda s: logits_divergence(s, teacher, MASK, 2.0), student.requires_grad_())


def test_classification_logits_need_no_mask():
    student, teacher = (tensor[:, 0].detach() for tensor in pair(3))
    expected = reference(student[:, None], teacher[:, None], torch.ones(3, 1).bool(), 1.0)
    torch.testing.assert_close(logits_divergence(student, teacher).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("student_size", "teacher_size"), [(50, 47), (47, 50)])
def test_vocabularies_of_different_size_are_cut_to_the_common_part_and_said_once(student_size, teacher_size, caplog):
    logits._warn_of_cut.cache_clear()
    student, teacher = pair(student_size, teacher_size)
    with caplog.at_level(logging.WARNING):
        got = logits_divergence(student, teacher, MASK)
        logits_divergence(student, teacher, MASK)
    assert ["only the first 47" in record.message for record in caplog.records] == [True]
    expected = reference(student[..., :47], teacher[..., :47], MASK, 1.0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    got.backward()
    assert (student.grad[..., 47:] == 0).all()
    assert student.grad[..., :47].abs().max() > 0


def test_a_token_ruled_out_on_both_sides_changes_nothing():
    student, teacher = pair()
    ruled_out = torch.zeros(50).index_fill(0, torch.tensor([3, 17]), -torch.inf)
    rest = ruled_out == 0
    got = logits_divergence(student + ruled_out, teacher + ruled_out, MASK)
    expected = reference(student[..., rest], teacher[..., rest], MASK, 1.0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    got.backward()
    assert student.grad.isfinite().all()


def test_float16_gradients_survive_many_rows_under_loss_scaling():
    student, teacher = (tensor.detach()[:1, :1].expand(1, 4096, 50).half() for tensor in pair())
    student = student.clone().requires_grad_()
    (65536 * logits_divergence(student, teacher)).backward()
    wide = student.detach().float().requires_grad_()
    (65536 * logits_divergence(wide, teacher.float())).backward()
    torch.testing.assert_close(student.grad.float(), wide.grad, rtol=2e-3, atol=1e-5)


def test_no_row_that_counts_is_no_loss():
    student, teacher = pair()
    loss = logits_divergence(student, teacher, torch.zeros_like(MASK))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"above 0; got 0\.0"):
        logits_divergence(*pair(), MASK, 0.0)


class WideFloat32(TorchDispatchMode):
    """Elements of the largest float32 tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("masked", [True, False])
def test_no_float32_copy_of_the_logits_is_made(masked, monkeypatch):
    monkeypatch.setattr(logits, "_CHUNK_ELEMENTS", 100)
    student, teacher = (tensor.detach().bfloat16() for tensor in pair())
    student.requires_grad_()
    with WideFloat32() as wide:
        logits_divergence(student, teacher, MASK if masked else None).backward()
    assert 0 < wide.elements <= 100


def test_regression_is_the_mean_squared_difference_and_teaches_the_student_only():
    student, teacher = (tensor.detach()[:, 0, 0].requires_grad_() for tensor in pair())
    loss = regression_mse(student, teacher)
    torch.testing.assert_close(loss, sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / 3)
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach() / 3)
