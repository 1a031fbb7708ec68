"""Every divergence against its definition in float64, on rows of logits."""

import pytest
import torch
from torch import Tensor

import makd
from makd.aspects import DIVERGENCES, divergence, logits_divergence
from makd.aspects.divergences import log_probabilities

VOCABULARY = 12


def kl(one: Tensor, other: Tensor) -> Tensor:
    return (one * (one / other).log()).sum(-1)


def joined(p: Tensor, q: Tensor, k: int) -> Tensor:
    """KL after all but the teacher's k likeliest tokens are made one."""
    top = p.topk(k).indices
    ours, theirs = (torch.cat([side.gather(-1, top), 1 - side.gather(-1, top).sum(-1)[:, None]], -1) for side in (q, p))
    return kl(theirs, ours)


REFERENCES = {
    ("forward_kl", None): lambda p, q: kl(p, q),
    ("reverse_kl", None): lambda p, q: kl(q, p),
    ("jsd", 0.5): lambda p, q: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    ("jsd", 0.1): lambda p, q: 0.1 * kl(p, 0.1 * p + 0.9 * q) + 0.9 * kl(q, 0.1 * p + 0.9 * q),
    ("skew_forward_kl", 0.1): lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    ("skew_forward_kl", 0.0): lambda p, q: kl(p, q),
    ("skew_reverse_kl", 0.1): lambda p, q: kl(q, 0.9 * p + 0.1 * q),
    ("skew_reverse_kl", 0.0): lambda p, q: kl(q, p),
    ("total_variation", None): lambda p, q: (p - q).abs().sum(-1) / 2,
    ("top_k", 3): lambda p, q: joined(p, q, 3),
}
"""(name, its setting) -> the definition."""


def pair(dtype: torch.dtype = torch.float64, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(spread * torch.randn(7, VOCABULARY, generator=generator, dtype=dtype) for _ in range(2))


def make(name: str, setting: float | None):
    return divergence(name, **({} if setting is None else {DIVERGENCES[name].setting: setting}))


def of_logits(function, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    return function(*(log_probabilities(side, temperature, side.dtype) for side in (student, teacher)))


def test_every_divergence_has_a_reference():
    assert {name for name, _ in REFERENCES} == set(DIVERGENCES)


@pytest.mark.parametrize(("name", "setting"), REFERENCES)
class TestEveryDivergence:
    def test_value_and_gradient_are_those_of_the_definition(self, name, setting):
        student, teacher = pair()
        student.requires_grad_()
        expected = REFERENCES[name, setting](teacher.softmax(-1), student.softmax(-1))
        values, slopes = of_logits(make(name, setting), student.detach(), teacher)
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
        (wanted,) = torch.autograd.grad(expected.sum(), student)
        torch.testing.assert_close(slopes, wanted, rtol=1e-9, atol=1e-12)

    def test_float32_is_near_the_definition_even_for_peaked_predictions(self, name, setting):
        student, teacher = pair(spread=6.0)
        expected = REFERENCES[name, setting](teacher.softmax(-1), student.softmax(-1))
        values, slopes = of_logits(make(name, setting), student.float(), teacher.float())
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
        _, exact = of_logits(make(name, setting), student, teacher)
        torch.testing.assert_close(slopes.double(), exact, rtol=1e-4, atol=1e-5)

    def test_gradient_is_the_numerical_derivative_at_a_temperature(self, name, setting):
        student, teacher = pair()
        mask = torch.tensor([True, False, True, True, True, False, True])
        torch.autograd.gradcheck(
            lambda logits: logits_divergence(logits, teacher, mask, 2.0, make(name, setting)), student.requires_grad_()
        )

    def test_is_zero_without_gradient_for_equal_sides_and_positive_otherwise(self, name, setting):
        student, teacher = pair(torch.float32)
        values, slopes = of_logits(make(name, setting), teacher, teacher)
        assert values.abs().max() <= 1e-6
        assert slopes.abs().max() <= 1e-6
        assert of_logits(make(name, setting), student, teacher)[0].min() > 1e-3

    def test_gradient_leaves_the_sum_of_logits_alone(self, name, setting):
        """Adding the same to all logits of a row changes no probability."""
        _, slopes = of_logits(make(name, setting), *pair())
        torch.testing.assert_close(slopes.sum(-1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)

    def test_a_token_ruled_out_on_both_sides_changes_nothing(self, name, setting):
        student, teacher = pair()
        ruled_out = torch.full((7, 2), -torch.inf, dtype=torch.float64)
        longer = [torch.cat([ruled_out, side], -1) for side in (student, teacher)]
        values, slopes = of_logits(make(name, setting), *longer)
        expected, wanted = of_logits(make(name, setting), student, teacher)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(slopes[:, 2:], wanted)
        assert (slopes[:, :2] == 0).all()


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_top_k_bounds_the_kl_from_below_and_rises_with_k(k):
    student, teacher = pair()
    whole, _ = of_logits(divergence("forward_kl"), student, teacher)
    part, _ = of_logits(divergence("top_k", k=k), student, teacher)
    more, _ = of_logits(divergence("top_k", k=k + 1), student, teacher)
    assert (part <= whole + 1e-12).all()
    assert (part <= more + 1e-12).all()
    assert (part >= 0).all()


@pytest.mark.parametrize("k", [VOCABULARY, VOCABULARY + 5])
def test_top_k_of_the_whole_vocabulary_is_the_kl(k):
    for got, expected in zip(
        of_logits(divergence("top_k", k=k), *pair()), of_logits(divergence("forward_kl"), *pair()), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_jsd_tends_to_the_kls_at_its_ends(beta, limit):
    got, _ = of_logits(divergence("jsd", beta=beta), *pair())
    expected, _ = of_logits(divergence(limit), *pair())
    torch.testing.assert_close(got / min(beta, 1 - beta), expected, rtol=1e-3, atol=0)


def test_skew_divergences_stay_finite_where_the_kls_do_not():
    student, teacher = pair(torch.float32)
    student[:, 0], teacher[:, 1] = -torch.inf, -torch.inf
    for name in ("skew_forward_kl", "skew_reverse_kl", "jsd"):
        values, slopes = of_logits(divergence(name), student, teacher)
        assert values.max() < 10
        assert slopes.abs().max() < 10


@pytest.mark.parametrize(
    ("name", "settings", "hint"),
    [
        ("jsd", {"beta": 0.0}, r"beta of jsd is in \(0, 1\); got 0.0"),
        ("jsd", {"beta": 1.0}, r"in \(0, 1\)"),
        ("skew_forward_kl", {"alpha": 1.0}, r"alpha of skew_forward_kl is in \[0, 1\)"),
        ("skew_reverse_kl", {"alpha": -0.1}, "got -0.1"),
        ("top_k", {"k": 0}, "k of top_k is at least 1; got 0"),
        ("foward_kl", {}, "'forward_kl'"),
    ],
)
def test_what_no_divergence_can_be_is_refused_by_the_function_and_the_term(name, settings, hint):
    with pytest.raises((ValueError, makd.MakdError), match=hint):
        divergence(name, **settings)
    with pytest.raises(makd.MakdError, match=hint):
        makd.Term(aspect="logits", divergence=name, **settings)


def test_a_setting_of_another_divergence_is_not_looked_at():
    assert divergence("forward_kl", beta=2.0, k=0) is DIVERGENCES["forward_kl"].function
