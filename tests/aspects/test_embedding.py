"""The distance of pooled vectors and the similarities between texts, against loops in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from makd.aspects import embedding_distance, similarity_mse

RIGHT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
LEFT = RIGHT.flip(1)
POOLINGS = ["mean", "cls", "last"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def reference_pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    real = [tokens[keep].double() for tokens, keep in zip(hidden, mask, strict=True)]
    return torch.stack([{"mean": tokens.mean(0), "cls": tokens[0], "last": tokens[-1]}[how] for tokens in real])


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("how", POOLINGS)
class TestDistance:
    def test_is_one_minus_cosine(self, how, mask):
        student, teacher = draw(2, 4, 6), draw(2, 4, 6, seed=1)
        got = embedding_distance(student, teacher, mask, how)
        pooled = reference_pool(student, mask, how), reference_pool(teacher, mask, how)
        expected = (1 - cosine_similarity(*pooled)).mean()
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
        (slope,), (wanted,) = torch.autograd.grad(got, student), torch.autograd.grad(expected, student)
        torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=1e-7)


def test_a_small_distance_keeps_its_digits():
    teacher = draw(2, 4, 6)
    student = teacher + 1e-4 * draw(2, 4, 6, seed=1)
    pooled = reference_pool(student, RIGHT, "mean"), reference_pool(teacher, RIGHT, "mean")
    expected = (1 - cosine_similarity(*pooled)).mean()  # about 1e-9, below float32's step at 1
    got = embedding_distance(student, teacher, RIGHT, "mean")
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("how", POOLINGS)
def test_a_text_without_tokens_sends_no_gradient(how):
    hidden = draw(2, 4, 6)
    mask = RIGHT.clone()
    mask[1] = False
    embedding_distance(hidden, draw(2, 4, 6, seed=1), mask, how).backward()
    assert (hidden.grad[1] == 0).all()
    assert hidden.grad[0].abs().max() > 0


def test_a_student_of_zeros_has_a_finite_gradient():
    student = torch.zeros(2, 4, 6, requires_grad=True)
    embedding_distance(student, draw(2, 4, 6), RIGHT, "mean").backward()
    assert student.grad.isfinite().all()


def test_similarity_is_over_pairs_of_different_texts():
    student, teacher = draw(4, 6), draw(4, 9, seed=1)
    got = similarity_mse(student, teacher)
    differences = [
        cosine_similarity(student[i].double(), student[j].double(), dim=0)
        - cosine_similarity(teacher[i].double(), teacher[j].double(), dim=0)
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    expected = torch.stack(differences).square().mean()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    (slope,), (wanted,) = torch.autograd.grad(got, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-7)


def test_similarity_of_one_text_is_zero():
    student = draw(1, 6)
    loss = similarity_mse(student, draw(1, 6, seed=1))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_similarity_does_not_see_a_rotation_of_the_space():
    teacher = draw(4, 6)
    rotation = torch.linalg.qr(draw(6, 6, seed=2).detach()).Q
    assert similarity_mse(teacher @ rotation, teacher) < 1e-10
