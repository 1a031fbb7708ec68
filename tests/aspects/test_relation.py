"""Self-relations against softmax in float64, written out; and cosines."""

import pytest
import torch

from makd.aspects import attention_kl, cosine_distance, relation_kl

MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()


def states(channels, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 6, channels, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def log_relations(values, heads):
    """(batch, heads, tokens, tokens) log-probabilities over real tokens."""
    split = values.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split @ split.mT / split.shape[-1] ** 0.5
    return scores.masked_fill(~MASK[:, None, None, :], -1e9).log_softmax(-1)


def reference(student, teacher, heads):
    theirs = log_relations(teacher.detach(), heads)
    kl = (theirs.exp() * (theirs - log_relations(student, heads))).sum(-1)
    return kl.transpose(1, 2)[MASK].mean()


@pytest.mark.parametrize(("ours", "theirs", "heads"), [(12, 12, 3), (8, 24, 4), (24, 12, 1), (6, 12, 6)])
def test_relations_are_those_of_a_softmax_that_is_written_out(ours, theirs, heads):
    student, teacher = states(ours), states(theirs, seed=1)
    found, expected = relation_kl(student, teacher, MASK, heads), reference(student, teacher, heads)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    slope, wanted = (torch.autograd.grad(loss, student)[0] for loss in (found, expected))
    torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-12)
    assert not slope[~MASK].any()


def test_the_gradient_is_that_of_finite_differences():
    teacher = states(8, seed=1)
    assert torch.autograd.gradcheck(lambda student: relation_kl(student, teacher, MASK, 2), states(4))


@pytest.mark.parametrize("method", ["kernel", "tiles"])
def test_attention_of_states_on_themselves_is_exact_too(method):
    """`attention_kl` with one tensor as query and key: the gradient is the sum of both."""
    student, teacher = states(8), states(24, seed=1)
    split = [side.unflatten(-1, (4, -1)).transpose(1, 2) for side in (student, teacher)]
    kl = attention_kl(split[1], split[1], split[0], split[0], MASK[:, None, None, :], method=method)
    loss = kl.transpose(1, 2)[MASK].mean()
    expected = reference(student, teacher, 4)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    slope, wanted = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-12)


def test_heads_have_to_divide_both_widths():
    with pytest.raises(ValueError, match="5 relation heads"):
        relation_kl(states(10), states(12), MASK, 5)


def test_a_cosine_knows_directions_only():
    student, teacher = states(8), states(8, seed=1)
    expected = 1 - torch.cosine_similarity(student, teacher, dim=-1)[MASK].mean()
    torch.testing.assert_close(cosine_distance(student, teacher, MASK), expected)
    torch.testing.assert_close(cosine_distance(3 * student, teacher, MASK), expected)
