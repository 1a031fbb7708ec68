"""What holds for every loss that compares a student with a teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from makd.aspects import (
    attention_kl,
    attention_loss,
    cosine_distance,
    embedding_distance,
    logits_divergence,
    normalised_mse,
    regression_mse,
    relation_kl,
    similarity_mse,
)

BATCH, TOKENS, CHANNELS, HEADS = 3, 7, 12, 3
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()


@dataclass(frozen=True)
class Case:
    """A loss of (student, teacher) tensors (batch, tokens, channels), with padding where MASK is False."""

    loss: Callable[[Tensor, Tensor], Tensor]
    takes_tokens: bool = True


def _attention(student: Tensor, teacher: Tensor, method: str, **settings) -> Tensor:
    """Queries are the channels by heads; keys the same of another text, finite at padding as attention demands."""

    def query_and_key(tensor: Tensor) -> tuple[Tensor, Tensor]:
        query = tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return query, torch.where(MASK[:, None, :, None], query, 5.0).roll(1, -1)

    if method == "one pass":
        return attention_loss(
            *query_and_key(teacher), *query_and_key(student), MASK, MASK[:, None, None, :], **settings
        )
    kl = attention_kl(
        *query_and_key(teacher), *query_and_key(student), MASK[:, None, None, :], method=method, **settings
    )
    return torch.where(MASK[:, None], kl, 0).sum() / (MASK.sum() * HEADS)


CASES = {
    "hidden, matrix, experts": Case(lambda s, t: normalised_mse(s, t, MASK)),
    "hidden, cosine": Case(lambda s, t: cosine_distance(s, t, MASK)),
    "relation": Case(lambda s, t: relation_kl(s, t, MASK, HEADS)),
    "logits": Case(lambda s, t: logits_divergence(s, t, MASK)),
    "logits, temperature 3": Case(lambda s, t: logits_divergence(s, t, MASK, temperature=3.0)),
    "labels": Case(lambda s, t: logits_divergence(s[:, 0], t[:, 0]), takes_tokens=False),
    "regression": Case(lambda s, t: regression_mse(s[:, 0, 0], t[:, 0, 0]), takes_tokens=False),
    "embedding, mean": Case(lambda s, t: embedding_distance(s, t, MASK, "mean")),
    "embedding, cls": Case(lambda s, t: embedding_distance(s, t, MASK, "cls")),
    "embedding, last": Case(lambda s, t: embedding_distance(s, t, MASK, "last")),
    "similarity": Case(lambda s, t: similarity_mse(s[:, 0], t[:, 0]), takes_tokens=False),
    "attention": Case(partial(_attention, method="tiles")),
    "attention, causal": Case(partial(_attention, method="tiles", is_causal=True)),
    "attention, softcap": Case(partial(_attention, method="tiles", softcap=2.0)),
    "attention, kernel": Case(partial(_attention, method="kernel")),
    "attention, one pass": Case(partial(_attention, method="one pass")),
}


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(BATCH, TOKENS, CHANNELS, generator=generator).to(dtype).requires_grad_() for _ in range(2)
    )


def gradient(case: Case, student: Tensor, teacher: Tensor) -> Tensor:
    return torch.autograd.grad(case.loss(student, teacher), student)[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
class TestEveryAspect:
    def test_is_zero_when_the_student_equals_the_teacher(self, case: Case):
        _, teacher = pair()
        student = teacher.detach().clone().requires_grad_()
        assert abs(case.loss(student, teacher).item()) <= 1e-6
        assert gradient(case, student, teacher).abs().max() <= 1e-6

    def test_is_positive_otherwise(self, case: Case):
        assert case.loss(*pair()).item() > 1e-3

    def test_falls_along_its_gradient(self, case: Case):
        student, teacher = pair()
        slope = gradient(case, student, teacher)
        step = 1e-3 / slope.norm()
        fall = case.loss(student, teacher) - case.loss(student - step * slope, teacher)
        torch.testing.assert_close(fall, step * slope.square().sum(), rtol=0.05, atol=1e-6)

    def test_sends_gradient_to_the_student_only(self, case: Case):
        student, teacher = pair()
        case.loss(student, teacher).backward()
        assert student.grad is not None
        assert student.grad.abs().max() > 0
        assert teacher.grad is None

    def test_is_a_float32_scalar_for_bfloat16_inputs_and_exact_for_their_values(self, case: Case):
        student, teacher = pair(torch.bfloat16)
        loss = case.loss(student, teacher)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, case.loss(student.float(), teacher.float()))
        slope = gradient(case, student, teacher)
        assert slope.dtype == torch.bfloat16
        wide = student.detach().float().requires_grad_()
        expected = gradient(case, wide, teacher.float())
        torch.testing.assert_close(slope.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())

    def test_stays_float32_under_autocast(self, case: Case):
        student, teacher = pair()
        with torch.autocast("cpu", torch.bfloat16):
            loss = case.loss(student, teacher)
        torch.testing.assert_close(loss, case.loss(student, teacher), rtol=1e-6, atol=0)

    def test_gives_the_same_gradient_twice(self, case: Case):
        student, teacher = pair()
        loss = case.loss(student, teacher)
        once, twice = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(once, twice, rtol=0, atol=0)

    def test_scales_its_gradient_with_its_weight(self, case: Case):
        student, teacher = pair()
        (tripled,) = torch.autograd.grad(3 * case.loss(student, teacher), student)
        torch.testing.assert_close(tripled, 3 * gradient(case, student, teacher), rtol=1e-5, atol=1e-8)


OF_TOKENS = {name: case for name, case in CASES.items() if case.takes_tokens}


@pytest.mark.parametrize("case", OF_TOKENS.values(), ids=OF_TOKENS.keys())
class TestEveryAspectOfTokens:
    @pytest.mark.parametrize("garbage", [1e4, float("inf"), float("nan")])
    def test_ignores_padding(self, case: Case, garbage: float):
        student, teacher = (
            torch.where(MASK[..., None], tensor.detach(), garbage).requires_grad_() for tensor in pair()
        )
        torch.testing.assert_close(case.loss(student, teacher), case.loss(*pair()), rtol=1e-6, atol=0)
        slope = gradient(case, student, teacher)
        torch.testing.assert_close(slope, gradient(case, *pair()), rtol=1e-5, atol=1e-8)
        assert (slope[~MASK] == 0).all()

    def test_does_not_change_with_more_padding(self, case: Case, monkeypatch: pytest.MonkeyPatch):
        expected = case.loss(*pair())
        longer = [torch.nn.functional.pad(tensor, (0, 0, 2, 3), value=7.0) for tensor in pair()]
        monkeypatch.setattr(f"{__name__}.MASK", torch.nn.functional.pad(MASK, (2, 3), value=False))
        torch.testing.assert_close(case.loss(*longer), expected, rtol=1e-5, atol=1e-7)
