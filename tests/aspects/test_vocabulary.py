"""Losses from hidden states and heads, in chunks, against the same from whole logits in float64."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from makd.anatomy.tokens import IGNORE_INDEX
from makd.aspects import DIVERGENCES, SoftLoss, chunked_logits_loss, divergence, logits, next_labels, vocabulary
from makd.capture import VocabularyHead

BATCH, TOKENS, VOCABULARY, OURS, THEIRS = 3, 5, 23, 8, 10
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
SETTINGS = {
    "plain": {},
    "bias": {"bias": True},
    "factor": {"scale": 0.3},
    "bound": {"softcap": 2.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 3.0},
}


@pytest.fixture(params=[30, 70, 2**20], ids=["a row", "three rows", "all rows"], autouse=True)
def chunk(request, monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_BYTES", 4 * request.param)
    monkeypatch.setattr(vocabulary, "_PIECE_ELEMENTS", request.param // 2)
    return request.param


PLAIN = SoftLoss()


class Case:
    """Hidden states, heads and labels of a student and a teacher."""

    def __init__(self, dtype=torch.float32, student_size=VOCABULARY, teacher_size=VOCABULARY, bias=False, **head):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.hidden = draw(BATCH, TOKENS, OURS).requires_grad_()
        self.weight = draw(student_size, OURS).requires_grad_()
        self.bias = draw(student_size).requires_grad_() if bias else None
        self.head = VocabularyHead(self.weight, self.bias, **head)
        self.teacher_hidden = draw(BATCH, TOKENS, THEIRS)
        self.teacher_head = VocabularyHead(draw(teacher_size, THEIRS), draw(teacher_size) if bias else None, **head)
        self.labels = torch.randint(student_size, (BATCH, TOKENS), generator=generator)
        self.labels[0, 1], self.labels[2] = IGNORE_INDEX, IGNORE_INDEX

    @property
    def leaves(self):
        return [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]

    def chunked(self, mask=MASK, soft=(PLAIN,), labels=None, hard_weight=1.0):
        return chunked_logits_loss(
            self.hidden, self.head, self.teacher_hidden, self.teacher_head, mask, soft, labels, hard_weight
        )

    def dense(self, mask=MASK, soft=(PLAIN,), labels=None, hard_weight=1.0):
        """(total, soft losses, hard loss) by the definition, differentiable in `leaves`."""

        def whole(hidden, head):
            wide = replace(head, weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())
            return wide.logits(hidden.double())

        ours, theirs = whole(self.hidden, self.head), whole(self.teacher_hidden, self.teacher_head)
        common = min(ours.shape[-1], theirs.shape[-1])
        parts = [
            logits.logits_divergence(
                ours[..., :common], theirs[..., :common], mask, loss.temperature, loss.divergence
            )
            for loss in soft
        ]  # fmt: skip
        total = sum(loss.weight * part for loss, part in zip(soft, parts, strict=True))
        hard = None
        if labels is not None:
            hard = functional.cross_entropy(ours.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
            total = total + hard_weight * hard
        return total, parts, hard


def assert_same(case: Case, tolerance: float = 1e-5, **arguments) -> None:
    """Values and all gradients, relative to the largest."""
    found, (total, soft, hard) = case.chunked(**arguments), case.dense(**arguments)
    torch.testing.assert_close(found.total.double(), total, rtol=tolerance, atol=tolerance)
    for got, expected in zip(found.soft, soft, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    if hard is not None:
        torch.testing.assert_close(found.hard.double(), hard, rtol=tolerance, atol=tolerance)
    for got, expected in zip(
        torch.autograd.grad(found.total, case.leaves), torch.autograd.grad(total, case.leaves), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("head", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradients_are_those_of_the_whole_logits(head, temperature):
    case = Case(**head)
    assert_same(case, soft=(SoftLoss(temperature=temperature),))
    assert_same(case, soft=(SoftLoss(temperature=temperature),), labels=case.labels, hard_weight=0.7)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_reaches_hidden_states_and_head(name):
    assert_same(Case(bias=True, softcap=5.0), soft=(SoftLoss(divergence=divergence(name, k=4)),))


def test_several_comparisons_and_the_labels_are_one_pass():
    case = Case(bias=True)
    soft = (
        SoftLoss(weight=2.0),
        SoftLoss(temperature=3.0, weight=0.25),
        SoftLoss(divergence=divergence("jsd"), weight=5.0),
    )
    assert_same(case, soft=soft, labels=case.labels, hard_weight=0.1)


def test_gradients_are_the_numerical_derivatives():
    case = Case(torch.float64, bias=True, scale=0.7, softcap=4.0)

    def total(hidden, weight, bias):
        head = replace(case.head, weight=weight, bias=bias)
        soft = (SoftLoss(temperature=2.0), SoftLoss(divergence=divergence("jsd")))
        return chunked_logits_loss(
            hidden, head, case.teacher_hidden, case.teacher_head, MASK, soft, case.labels, 0.5
        ).total

    torch.autograd.gradcheck(total, case.leaves, fast_mode=True)


def test_labels_alone_need_no_teacher():
    case = Case()
    found = chunked_logits_loss(case.hidden, case.head, soft=(), labels=case.labels, hard_weight=3.0)
    total, _, hard = case.dense(soft=(), labels=case.labels, hard_weight=3.0)
    torch.testing.assert_close(found.hard.double(), hard, rtol=1e-5, atol=0)
    for got, expected in zip(
        torch.autograd.grad(found.total, case.leaves), torch.autograd.grad(total, case.leaves), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_comparison_without_a_teacher_and_a_temperature_of_zero_are_refused():
    case = Case()
    with pytest.raises(ValueError, match="needs the teacher's hidden states"):
        chunked_logits_loss(case.hidden, case.head)
    with pytest.raises(ValueError, match=r"above 0; got 0\.0"):
        SoftLoss(temperature=0.0)


@pytest.mark.parametrize("garbage", [1e4, float("inf"), float("nan")])
def test_what_stands_in_the_padding_never_counts(garbage):
    case = Case()
    labels = torch.where(MASK, case.labels, IGNORE_INDEX)
    labels[0, 4] = 3  # a label where nothing is compared
    kept = MASK.clone()
    kept[0, 4] = True
    case.hidden = torch.where(kept[..., None], case.hidden.detach(), garbage).requires_grad_()
    case.teacher_hidden = torch.where(MASK[..., None], case.teacher_hidden, garbage)
    found = case.chunked(labels=labels)
    (slope,) = torch.autograd.grad(found.total, case.hidden)
    clean = Case().chunked(labels=labels)
    torch.testing.assert_close(found.total, clean.total)
    assert (slope[~kept] == 0).all()
    assert slope[kept].isfinite().all()
    assert slope[0, 4].abs().max() > 0


def test_the_label_of_the_next_token_is_the_causal_models_own_loss():
    case = Case()
    ours = case.head.logits(case.hidden).double()
    expected = functional.cross_entropy(
        ours[:, :-1].flatten(0, 1), case.labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )  # fmt: skip
    found = case.chunked(soft=(), labels=next_labels(case.labels))
    torch.testing.assert_close(found.hard.double(), expected, rtol=1e-5, atol=0)
    assert next_labels(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORE_INDEX]]


@pytest.mark.parametrize(("student_size", "teacher_size"), [(23, 20), (20, 23)])
@pytest.mark.parametrize("with_labels", [True, False])
def test_vocabularies_padded_differently_are_cut_for_the_comparison_only_and_said_once(
    student_size, teacher_size, with_labels, caplog
):
    logits._warn_of_cut.cache_clear()
    case = Case(student_size=student_size, teacher_size=teacher_size, bias=True, softcap=3.0)
    with caplog.at_level(logging.WARNING):
        assert_same(case, labels=case.labels if with_labels else None)
        case.chunked()
    assert ["only the first 20" in record.message for record in caplog.records] == [True]
    (slope,) = torch.autograd.grad(case.chunked().total, case.weight)
    assert (slope[20:] == 0).all()


def test_is_zero_for_equal_sides_and_positive_otherwise():
    case = Case()
    assert case.chunked().total > 0.1
    case.teacher_hidden, case.teacher_head = case.hidden.detach(), replace(case.head, weight=case.weight.detach())
    found = case.chunked()
    assert found.total.abs() <= 1e-6
    assert max(slope.abs().max() for slope in torch.autograd.grad(found.total, case.leaves)) <= 1e-6


def test_nothing_that_counts_is_no_loss_and_no_gradient():
    case = Case()
    found = case.chunked(mask=torch.zeros_like(MASK), labels=torch.full_like(case.labels, IGNORE_INDEX))
    found.total.backward()
    assert found.total == found.hard == found.soft[0] == 0
    assert (case.weight.grad == 0).all()


def test_a_tied_weight_gets_the_gradient_of_both_its_uses():
    case, ids = Case(), torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS)
    case.hidden = functional.embedding(ids, case.weight).tanh()
    (got,) = torch.autograd.grad(case.chunked().total, case.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(case.dense()[0], case.weight)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_frozen_head_gets_no_gradient():
    case = Case()
    case.weight.requires_grad_(False)
    case.chunked().total.backward()
    assert case.weight.grad is None
    assert case.hidden.grad.abs().max() > 0


def test_the_losses_alone_carry_no_gradient_and_the_total_scales_its_own():
    case = Case()
    found = case.chunked(labels=case.labels)
    assert not found.soft[0].requires_grad
    assert not found.hard.requires_grad
    once = torch.autograd.grad(found.total, case.leaves, retain_graph=True)
    tripled = torch.autograd.grad(3 * found.total, case.leaves)
    for one, three in zip(once, tripled, strict=True):
        torch.testing.assert_close(three, 3 * one)


def test_bfloat16_values_are_exact_for_what_the_heads_round_to():
    case = Case(torch.bfloat16)
    found = case.chunked(labels=case.labels)
    ours, theirs = case.head.logits(case.hidden), case.teacher_head.logits(case.teacher_hidden)
    expected = logits.logits_divergence(ours, theirs, MASK)
    torch.testing.assert_close(found.soft[0], expected, rtol=1e-5, atol=0)
    assert found.total.dtype == torch.float32
    wide = torch.autograd.grad(case.dense(labels=case.labels)[0], case.leaves)
    for got, exact in zip(torch.autograd.grad(found.total, case.leaves), wide, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


def test_autocast_multiplies_in_its_dtype_and_keeps_the_softmax_and_gradients_wide():
    case = Case()
    with torch.autocast("cpu", torch.bfloat16):
        found = case.chunked()
        ours, theirs = case.head.logits(case.hidden), case.teacher_head.logits(case.teacher_hidden)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(found.total, logits.logits_divergence(ours, theirs, MASK), rtol=1e-5, atol=0)
    wide = torch.autograd.grad(case.dense()[0], case.leaves)
    for got, exact in zip(torch.autograd.grad(found.total, case.leaves), wide, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


def test_float16_gradients_survive_many_rows_under_loss_scaling():
    case = Case(torch.float16)
    case.hidden = case.hidden.detach()[:1, :1].expand(1, 4096, OURS).clone().requires_grad_()
    case.teacher_hidden = case.teacher_hidden[:1, :1].expand(1, 4096, THEIRS)
    (slope,) = torch.autograd.grad(4096 * case.chunked(mask=None).total, case.hidden)
    (exact,) = torch.autograd.grad(4096 * case.dense(mask=None)[0], case.hidden)
    torch.testing.assert_close(slope.float(), exact.float(), rtol=0.02, atol=0.01)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor with a vocabulary in its shape that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and VOCABULARY in tensor.shape:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "top_k"])
def test_no_more_than_a_chunk_of_logits_is_ever_made(name, chunk):
    if chunk > BATCH * TOKENS * VOCABULARY:
        return  # one chunk holds all
    case = Case(bias=True, softcap=3.0)
    with Largest() as seen:
        case.chunked(soft=(SoftLoss(divergence=divergence(name)),), labels=case.labels).total.backward()
    assert 0 < seen.elements <= max(chunk, VOCABULARY * THEIRS)
    assert max(chunk, VOCABULARY * THEIRS) < BATCH * TOKENS * VOCABULARY
