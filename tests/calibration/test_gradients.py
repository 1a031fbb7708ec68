"""What a change in a linear's output does to the model's outputs, against exact metrics from full Jacobians."""

from types import SimpleNamespace

import pytest
import torch

from makd.anatomy import resolve
from makd.calibration.gradients import GradientWatcher, collect_gradient_moments
from makd.calibration.moments import InputMoments
from makd.calibration.probes import TEXT_PROBES
from makd.errors import DataError
from tests.models import batch, tiny

DRAWS = 2048
"""Copies of one text in a batch: independent probes of it."""
SLACK = 0.12
"""Of a second moment from thousands of draws, relative to its norm; it errs by a few percent."""


def collect(model, batches, seed=0):
    return collect_gradient_moments(model, resolve(model), batches, seed)


def one_text(model, tokens=5, padding=0, pad_id=0):
    """One text of `tokens` real tokens, and the same with padding on the right, as `(alone, padded)`."""
    inputs = {name: rows[:1, :tokens] for name, rows in batch(model, padded=False).items()}
    padded = {
        name: torch.nn.functional.pad(rows, (0, padding), value=0 if "mask" in name else pad_id)
        for name, rows in inputs.items()
    }
    return inputs, padded


def probabilities_metric(logits):
    """Fisher information of a softmax with respect to its logits: diag(p) - p pᵀ."""
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def outputs_and_metric(output, problem_type=None):
    """Each independent part of a text's outputs, and the metric in which changes of it are measured."""
    if "start_logits" in output:
        parts = [output.start_logits[0], output.end_logits[0]]
        return [(part, probabilities_metric(part.detach())) for part in parts]
    if "logits" in output:
        parts = output.logits[0] if output.logits.dim() == 3 else output.logits
        if problem_type == "multi_label_classification":  # each label is a choice of its own, of variance p (1 - p)
            p = parts.detach().sigmoid()
            return [(part, torch.diag(variance)) for part, variance in zip(parts, p * (1 - p), strict=True)]
        if problem_type == "regression":
            return [(part, torch.eye(len(part), dtype=part.dtype)) for part in parts]
        if output.logits.shape[-1] > 1:
            return [(part, probabilities_metric(part.detach())) for part in parts]
        return [(part, torch.eye(1, dtype=part.dtype)) for part in parts]
    mean = output[0][0].mean(0)
    embedding = mean / mean.norm()
    return [(embedding, torch.eye(len(embedding), dtype=mean.dtype))]


def exact_moments(model, inputs, names):
    """Mean over tokens s of the sum over outputs z of J_s(z)ᵀ M(z) J_s(z), J by one backward for each output."""
    seen = {}

    def keep(name):
        def hook(_module, _inputs, output):
            seen[name] = output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    output = model(**inputs)
    for hook in hooks:
        hook.remove()
    moments = {name: torch.zeros(seen[name].shape[-1], seen[name].shape[-1], dtype=torch.float64) for name in names}
    for part, metric in outputs_and_metric(output, model.config.problem_type):
        rows = [torch.autograd.grad(value, [seen[name] for name in names], retain_graph=True) for value in part]
        for index, name in enumerate(names):
            jacobian = torch.stack([row[index][0] for row in rows]).double()  # outputs, tokens, features
            moments[name] += torch.einsum("ati,ab,btj->ij", jacobian, metric.double(), jacobian)
    return {name: moment / seen[name].shape[1] for name, moment in moments.items()}


@pytest.mark.parametrize(
    ("family", "head", "settings", "names"),
    [
        ("bert", "base", {}, ["encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"]),
        ("bert", "sequence_classification", {"num_labels": 3}, ["bert.encoder.layer.0.attention.self.value"]),
        ("bert", "sequence_classification", {"num_labels": 1}, ["bert.encoder.layer.0.intermediate.dense"]),
        (
            "bert",
            "sequence_classification",
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            ["bert.encoder.layer.1.output.dense"],
        ),
        (
            "bert",
            "sequence_classification",
            {"num_labels": 3, "problem_type": "regression"},
            ["bert.encoder.layer.0.output.dense"],
        ),
        ("bert", "token_classification", {"num_labels": 3}, ["bert.encoder.layer.1.intermediate.dense"]),
        ("bert", "token_classification", {"num_labels": 1}, ["bert.encoder.layer.1.intermediate.dense"]),
        ("bert", "question_answering", {}, ["bert.encoder.layer.0.attention.output.dense"]),
        ("bert", "masked_lm", {}, ["bert.encoder.layer.1.output.dense"]),
        ("llama", "causal_lm", {}, ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]),
        ("t5", "base", {}, ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v"]),
    ],
)
def test_moments_are_the_metric_of_the_outputs_and_padding_does_not_count(family, head, settings, names):
    model = tiny(family, head, **settings)
    alone, padded = one_text(model, padding=3)
    exact = exact_moments(model, alone, names)
    rows = {name: value.expand(DRAWS // 8, -1) for name, value in padded.items()}
    moments = collect(model, [rows] * 8)
    for name in names:
        error = torch.dist(moments[name].gram, exact[name]) / exact[name].norm()
        assert error < SLACK, f"{name}: {error:.3f}"


def test_with_the_same_probes_moments_are_those_of_a_loop_over_texts():
    model = tiny("bert")
    inputs, name = batch(model, padded=True), "encoder.layer.0.intermediate.dense"
    generator = torch.Generator().manual_seed(3)
    gradients = []
    for number, probes in enumerate([torch.randn(4, 32, generator=generator) for _ in range(TEXT_PROBES)]):
        tokens = []
        for ids, mask, probe in zip(inputs["input_ids"], inputs["attention_mask"], probes, strict=True):
            seen = SimpleNamespace(output=None)
            hook = model.get_submodule(name).register_forward_hook(
                lambda _m, _i, output, seen=seen: setattr(seen, "output", output)
            )
            mean = model(ids[None, mask.bool()])[0][0].mean(0)
            hook.remove()
            tokens += torch.autograd.grad((mean / mean.norm()) @ probe, seen.output)[0][0].unbind()
        gradients += tokens[number::TEXT_PROBES]  # each token is looked at once, by one probe
    gradients = torch.stack(gradients).double()
    moments = collect(model, [inputs], seed=3)[name]
    assert moments.rows == len(gradients) == inputs["attention_mask"].sum()
    torch.testing.assert_close(moments.gram, gradients.T @ gradients / len(gradients), rtol=1e-3, atol=1e-9)


def test_each_real_token_of_an_expert_is_looked_at_once_by_the_next_probe():
    anatomy = resolve(tiny("mixtral"))
    stack = anatomy.stacks[0]
    watcher = GradientWatcher(anatomy, {stack.name: InputMoments(stack.out_features)})
    watcher.start({}, probes=4)
    output = torch.zeros(8, stack.out_features, requires_grad=True) + 0
    watcher.watch_expert(stack.name, output, torch.tensor([1, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool))
    probes = torch.randn(4, 8, stack.out_features, generator=torch.Generator().manual_seed(0))
    for watcher.probe, gradient in enumerate(probes):
        output.backward(gradient, retain_graph=True)
    watcher.finish()
    real = (0, 1, 3, 4, 5, 7)
    rows = torch.stack([probes[place % 4, token] for place, token in enumerate(real)]).double()
    moments = watcher.gradients[stack.name].moments
    assert moments.rows == 6
    torch.testing.assert_close(moments.gram, rows.T @ rows / 6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family", ["bert", "gpt2", "opt", "albert", "deberta_v2", "modernbert", "gemma2", "bart", "t5"]
)
def test_every_factorizable_linear_gets_gradients(family):
    model = tiny(family)
    moments = collect(model, [batch(model)])
    assert moments.keys() == set(resolve(model).linears)
    assert all(moment.rows > 0 and moment.gram.trace() > 0 for moment in moments.values())


def test_the_same_seed_gives_the_same_moments_and_another_seed_others():
    model = tiny("llama", "causal_lm")
    one, same, other = (collect(model, [batch(model)], seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name].gram, same[name].gram) for name in one)
    assert not any(torch.equal(one[name].gram, other[name].gram) for name in one)


def test_labels_are_not_looked_at():
    model = tiny("bert", "sequence_classification", num_labels=3)
    inputs = batch(model)
    labelled = {**inputs, "labels": torch.tensor([0, 1, 2, 0])}
    one, two = collect(model, [inputs]), collect(model, [labelled])
    assert all(torch.equal(one[name].gram, two[name].gram) for name in one)


def test_the_model_is_afterwards_as_it_was():
    model = tiny("bert").train()
    frozen = model.get_parameter("embeddings.word_embeddings.weight").requires_grad_(False)
    kept = model.get_parameter("encoder.layer.0.output.dense.bias")
    kept.grad = torch.ones_like(kept)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, [batch(model)])
    assert model.training
    assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [frozen]
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not kept)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failing_forward_leaves_the_model_as_it_was():
    model = tiny("bert").train()
    with pytest.raises(IndexError):
        collect(model, [{"input_ids": torch.tensor([[10**6]])}])
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_of_a_model_in_training_mode_is_not_in_the_moments():
    model = tiny("bert")
    still = collect(model, [batch(model)])
    training = collect(model.train(), [batch(model)])
    assert all(torch.equal(still[name].gram, training[name].gram) for name in still)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["base", "question_answering", "masked_lm"])
def test_half_precision_models_give_finite_moments(head, dtype):
    model = tiny("bert", head).to(dtype)
    moments = collect(model, [batch(model)])
    assert all(torch.isfinite(moment.gram).all() for moment in moments.values())


def test_no_batches_are_refused():
    with pytest.raises(DataError, match="at least one batch"):
        collect(tiny("bert"), [])
