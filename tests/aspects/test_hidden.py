"""normalised_mse, of hidden states and of linears, against loops in float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from makd.aspects import normalised_mse

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 1]]).bool()


def reference(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Token by token and channel by channel."""
    places = [(row, token) for row, token in mask.nonzero().tolist()]
    student, teacher = student.double(), teacher.double()
    errors, variances = [], []
    for channel in range(student.shape[-1]):
        values = torch.stack([teacher[row, token, channel] for row, token in places])
        variances.append(((values - values.mean()) ** 2).mean())
        errors += [(student[row, token, channel] - teacher[row, token, channel]) ** 2 for row, token in places]
    return torch.stack(errors).mean() / torch.stack(variances).mean()


def pair(seed: int = 0, channels: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(3, 4, channels, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def test_value_and_gradient_agree_with_the_definition():
    student, teacher = pair()
    got, expected = normalised_mse(student, teacher, MASK), reference(student, teacher, MASK)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    (slope,), (wanted,) = torch.autograd.grad(got, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=1e-8)


def test_gradient_is_the_value_s_numerical_derivative():
    student, teacher = pair()
    teacher = teacher.double()
    torch.autograd.gradcheck(lambda s: normalised_mse(s, teacher, MASK), student.detach().double().requires_grad_())


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_does_not_depend_on_the_layer_s_scale(scale, seed):
    student, teacher = pair(seed)
    expected = normalised_mse(student, teacher, MASK)
    torch.testing.assert_close(normalised_mse(scale * student, scale * teacher, MASK), expected, rtol=1e-4, atol=0)


@given(offset=st.floats(-30, 30), seed=st.integers(0, 100))
def test_does_not_depend_on_a_channel_that_stands_off_at_every_token(offset, seed):
    student, teacher = pair(seed)
    expected = normalised_mse(student, teacher, MASK)
    shift = torch.tensor([0.0, 0.0, offset, 0.0, 0.0])
    torch.testing.assert_close(normalised_mse(student + shift, teacher + shift, MASK), expected, rtol=1e-3, atol=0)


def test_is_one_for_a_student_that_knows_the_channel_means_only():
    _, teacher = pair()
    means = teacher[MASK].mean(0).expand_as(teacher)
    torch.testing.assert_close(normalised_mse(means, teacher, MASK), torch.tensor(1.0))


def test_an_outlier_channel_of_a_wide_layer_keeps_its_digits():
    student, teacher = pair(channels=768)
    with torch.no_grad():
        teacher[..., 7] += 300.0
        student[..., 7] += 300.0
    got, expected = normalised_mse(student, teacher, MASK), reference(student, teacher, MASK)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=0)


def test_one_token_is_measured_by_its_mean_square():
    student, teacher = pair()
    mask = torch.zeros_like(MASK)
    mask[1, 2] = True
    expected = (student[1, 2] - teacher[1, 2]).square().mean() / teacher[1, 2].square().mean()
    torch.testing.assert_close(normalised_mse(student, teacher, mask), expected)


def test_a_teacher_of_zeros_has_unit_one():
    student, teacher = pair()
    expected = student[MASK].square().mean()
    torch.testing.assert_close(normalised_mse(student, torch.zeros_like(teacher), MASK), expected)


def test_no_real_token_is_no_loss():
    student, teacher = pair()
    loss = normalised_mse(student, teacher, torch.zeros_like(MASK))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_a_diverged_student_is_not_hidden():
    student, teacher = pair()
    with torch.no_grad():
        student[0, 0, 0] = torch.nan
    assert normalised_mse(student, teacher, MASK).isnan()
