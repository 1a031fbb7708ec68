"""Draws of the metric of a model's outputs, over a vocabulary for a chunk of tokens at a time."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from makd.anatomy import resolve
from makd.calibration import probes
from makd.calibration.probes import TEXT_PROBES, Probes
from tests.models import batch, tiny

WORDS = 160
MODELS = [("llama", "causal_lm"), ("bert", "masked_lm"), ("gemma2", "causal_lm"), ("gpt2", "causal_lm")]


def make(name, head):
    return tiny(name, head, vocab_size=WORDS).requires_grad_(False)


def drawn(model, inputs, seed=0):
    """What is differentiated, with its gradient, and the gradient at the embeddings that follows from both."""
    leaves = []

    def watch(_module, _inputs, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()

    made = Probes(model, resolve(model), seed)
    handle = model.get_input_embeddings().register_forward_hook(watch)
    ((tensor, gradient),) = made.draw(inputs, lambda: model(**inputs))
    handle.remove()
    return torch.autograd.grad(tensor, leaves[-1], gradient)[0]


def dense(model, inputs, seed=0):
    """The same from the logits of the whole model."""
    leaves = []

    def watch(_module, _inputs, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()

    handle = model.get_input_embeddings().register_forward_hook(watch)
    logits = model(**inputs).logits[inputs["attention_mask"].bool()].float()
    handle.remove()
    uniform = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(seed))
    reached = logits.detach().softmax(-1).cumsum(-1)
    choices = (reached <= uniform * reached[:, -1:]).sum(-1)
    return torch.autograd.grad(cross_entropy(logits, choices, reduction="sum"), leaves[-1])[0]


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_gradients_in_chunks_are_those_of_all_logits_at_once(name, head, monkeypatch):
    monkeypatch.setattr(probes, "CHUNK_ELEMENTS", 5 * WORDS)
    model = make(name, head).double()
    inputs = batch(model)
    found, expected = drawn(model, inputs), dense(model, inputs)
    assert torch.dist(found, expected) < 1e-5 * expected.norm()


class Largest(TorchDispatchMode):
    """Notes how many rows of logits there are in any tensor that is made."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            is_wide = isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == WORDS
            if is_wide and tensor.shape[-2] != 32:  # the head's weight, turned
                self.rows = max(self.rows, tensor.numel() // WORDS)
        return result


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_logits_are_never_made_whole(name, head, monkeypatch):
    monkeypatch.setattr(probes, "CHUNK_ELEMENTS", 3 * WORDS)
    model = make(name, head)
    inputs = batch(model)
    with Largest() as largest:
        drawn(model, inputs)
    assert 3 <= largest.rows <= 6, "three of a chunk; six when the head is tried on a few tokens"
    with Largest() as whole:
        dense(model, inputs)
    assert whole.rows >= inputs["attention_mask"].sum()


def test_predictions_are_drawn_by_their_probabilities():
    model = make("llama", "causal_lm")
    made = Probes(model, resolve(model), 0)
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -30.0]).expand(20_000, -1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(made._likelihood(logits), logits)
    share = torch.bincount(gradient.argmin(-1), minlength=5) / len(logits)
    torch.testing.assert_close(share, logits[0].detach().softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("name", "head", "in_chunks", "count"),
    [
        ("llama", "causal_lm", True, 1), ("bert", "masked_lm", True, 1), ("bert", "token_classification", False, 1),
        ("bert", "sequence_classification", False, TEXT_PROBES), ("llama", "base", False, TEXT_PROBES),
    ],
)  # fmt: skip
def test_tokens_get_a_probe_and_texts_several(name, head, in_chunks, count):
    model = tiny(name, head).requires_grad_(False)
    made, inputs = Probes(model, resolve(model), 0), batch(model)
    assert made.in_chunks == in_chunks
    assert made.count == count
    model.get_input_embeddings().weight.requires_grad_(True)
    assert len(list(made.draw(inputs, lambda: model(**inputs)))) == count


def test_the_same_seed_draws_the_same():
    model = make("llama", "causal_lm")
    inputs = batch(model)
    assert torch.equal(drawn(model, inputs, 1), drawn(model, inputs, 1))
    assert not torch.equal(drawn(model, inputs, 1), drawn(model, inputs, 2))
