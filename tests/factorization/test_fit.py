"""Regression in forward order: each group of linears is fitted to what the student, up to there, feeds it."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch

import makd
from makd.anatomy import linear_shape, resolve
from makd.calibration.source import ModelSource
from makd.calibration.store import MemoryStore
from makd.calibration.walk import Walk
from makd.factorization.depth import skipping
from makd.factorization.fit import (
    GROUPS,
    HELD_OUT_EVERY,
    TEXT_DEPTH_GAIN,
    FitSettings,
    depth_sensitivities,
    fit_layer_,
    fit_linear,
)
from makd.factorization.layers import begin_, make_layers_
from makd.progress import nobody
from makd.solvers import svd, whitened
from makd.solvers.regression import RIDGE
from makd.student.linear import LowRankLinear
from tests.anatomy.recording import watch
from tests.models import batch, tiny

BUDGET = makd.Budget(keep_linears=0.5)
SUMS = {
    "bert": {"attention.output.dense": "attention.output.LayerNorm", "output.dense": "output.LayerNorm"},
    "llama": {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""},
    "gpt_neox": {"attention.dense": "", "mlp.dense_4h_to_h": ""},
    "opt": {"self_attn.out_proj": "final_layer_norm", "fc2": ""},
}
"""Linear of a layer -> the module of the layer that reads the sum which its output joins; "" for the layer's output."""


def make_batches(model, count=4):
    return [batch(model, padded=True, seed=seed) for seed in range(count)]


def fit_student(teacher, ranks, batches, gram=None, dropped=()):
    """A copy of `teacher` without some layers, with factors of these ranks."""

    def walk_through(whole=None):
        walk = Walk(ModelSource(teacher), resolve(teacher), batches, MemoryStore(), whole=whole)
        assert not list(walk.up(nobody))
        return walk

    whole = walk_through() if dropped else None
    with skipping(teacher, dropped):
        student, walk = copy.deepcopy(teacher), walk_through(whole)
        begin_(walk)
        make_layers_(walk, ModelSource(student), partial(fit_layer_, walk, student, FitSettings(ranks, gram=gram)))
    return student


def alike(teacher):
    """Weights of errors that weigh all of them alike."""
    return lambda name: torch.eye(linear_shape(teacher.get_submodule(name))[0], dtype=torch.float64)


def regress(inputs, outputs, weight, bias, rank):
    """Reduced-rank ridge regression on the raw rows, by least squares: (product of the factors, bias)."""
    origin = bias is None
    x_mean, y_mean = (torch.zeros_like(side[0]) if origin else side.mean(0) for side in (inputs, outputs))
    x, y = inputs - x_mean, outputs - y_mean
    penalty = RIDGE * float(x.square().mean())
    pull = (len(x) * penalty) ** 0.5
    solved = torch.linalg.lstsq(torch.cat([x, pull * torch.eye(x.shape[1]).double()]), torch.cat([y, pull * weight.T]))
    directions = torch.linalg.svd(x @ solved.solution, full_matrices=False).Vh[:rank]
    product = directions.T @ directions @ solved.solution.T
    return product, None if origin else y_mean - product @ x_mean


def _real_rows(calls, name, masks):
    rows = [seen[name][0].reshape(mask.numel(), -1) for seen, mask in zip(calls, masks, strict=True)]
    return torch.cat(rows)[torch.cat([mask.flatten() for mask in masks])]


def _stream(forwards, layer, reader, masks):
    """The residual stream where `reader` takes it, or as the layer leaves it."""
    if reader:
        return _real_rows([seen.inputs for seen in forwards], f"{layer.module}.{reader}", masks)
    return _real_rows([seen.outputs for seen in forwards], layer.module, masks)


def fit_slowly(teacher, batches, ranks, sums, dropped=()):
    """The same student from whole forwards of whole models, with dense linears in the place of factors."""
    with skipping(teacher, dropped):
        anatomy, student = resolve(teacher), copy.deepcopy(teacher)
    masks = [inputs["attention_mask"].bool() for inputs in batches]
    wanted = [watch(teacher, inputs) for inputs in batches]
    for layer in anatomy.layers:
        for group in GROUPS:
            found = [watch(student, inputs) for inputs in batches]
            for name in dict.fromkeys(layer.roles[role].module for role in group if role in layer.roles):
                x = _real_rows([seen.inputs for seen in found], name, masks)
                own, y = (_real_rows([seen.outputs for seen in side], name, masks) for side in (found, wanted))
                reader = sums.get(name.removeprefix(f"{layer.module}."))
                if reader is not None:
                    mine, theirs = (_stream(side, layer, reader, masks) for side in (found, wanted))
                    y = theirs - (mine - own)
                linear = student.get_submodule(name)
                turned = linear.weight.shape != (y.shape[1], x.shape[1])
                weight = linear.weight.data.T if turned else linear.weight.data
                product, bias = regress(x, y, weight, linear.bias, ranks[name])
                linear.weight.data = product.T if turned else product
                if bias is not None:
                    linear.bias.data = bias
    return student


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("weighed", [False, True], ids=["outputs", "weighed alike, so that targets follow from inputs"])
def test_it_is_the_regression_of_whole_forwards_one_group_after_the_other(name, weighed, monkeypatch):
    # inputs behind a LayerNorm sum to zero: what the solver then adds to their moments would hide the comparison
    monkeypatch.setattr(whitened, "RIDGE", 1e-13)
    monkeypatch.setattr(svd, "WORTHWHILE", 0.0)  # whole decompositions, not just to a hundredth of the error
    teacher = tiny(name).double()
    batches = make_batches(teacher, HELD_OUT_EVERY - 1)  # none is held out, so the ridge is the fixed one
    ranks = dict.fromkeys(resolve(teacher).linears, 8)
    student = fit_student(teacher, ranks, batches, gram=alike(teacher) if weighed else None)
    slow = fit_slowly(teacher, batches, ranks, SUMS[name])
    for linear in ranks:
        mine, theirs = student.get_submodule(linear), slow.get_submodule(linear)
        torch.testing.assert_close(mine.dense_weight(), theirs.weight.data, rtol=1e-5, atol=1e-7)
        if theirs.bias is not None:
            torch.testing.assert_close(mine.bias, theirs.bias.data, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SUMS)
def test_layers_after_a_dropped_one_are_fitted_to_what_the_teacher_with_it_gives(name, monkeypatch):
    monkeypatch.setattr(whitened, "RIDGE", 1e-13)
    monkeypatch.setattr(svd, "WORTHWHILE", 0.0)
    teacher = tiny(name, num_hidden_layers=3).double()
    batches, dropped = make_batches(teacher, HELD_OUT_EVERY - 1), [resolve(teacher).layers[1].module]
    with skipping(teacher, dropped):
        ranks = dict.fromkeys(resolve(teacher).linears, 8)
    student = fit_student(teacher, ranks, batches, dropped=dropped)
    slow = fit_slowly(teacher, batches, ranks, SUMS[name], dropped)
    for linear in ranks:
        mine, theirs = student.get_submodule(linear), slow.get_submodule(linear)
        torch.testing.assert_close(mine.dense_weight(), theirs.weight.data, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma2", "phi3"])
def test_full_rank_gives_the_teachers_outputs(name):
    teacher = tiny(name).double()
    anatomy, batches = resolve(teacher), make_batches(teacher)
    ranks = {linear: min(teacher.get_submodule(linear).weight.shape) for linear in anatomy.linears}
    student = fit_student(teacher, ranks, batches)
    unseen = batch(teacher, seed=99)
    with torch.no_grad():
        real = unseen["attention_mask"].bool()
        torch.testing.assert_close(student(**unseen)[0][real], teacher(**unseen)[0][real], rtol=1e-4, atol=1e-6)


def test_what_is_not_fitted_stays_as_it_is():
    teacher = tiny("bert")
    student = makd.factorize(teacher, BUDGET, solver="regression", calibration=make_batches(teacher))
    fitted = tuple(student.factorization.ranks)
    theirs = teacher.state_dict()
    others = [name for name in student.state_dict() if not name.startswith(fitted)]
    assert {"embeddings.word_embeddings.weight", "pooler.dense.weight"} <= set(others)
    assert all(torch.equal(student.state_dict()[name], theirs[name]) for name in others)


def test_a_linear_without_a_rank_stays_dense():
    teacher = tiny("bert")
    dense, *others = resolve(teacher).linears
    student = fit_student(teacher, {dense: None, **dict.fromkeys(others, 8)}, make_batches(teacher))
    assert torch.equal(student.get_submodule(dense).weight, teacher.get_submodule(dense).weight)
    assert all(isinstance(student.get_submodule(name), LowRankLinear) for name in others)


def test_a_teacher_in_train_mode_gives_the_same_student_and_stays_in_it():
    teacher = tiny("bert")
    assert teacher.config.hidden_dropout_prob > 0
    batches = make_batches(teacher)
    one = makd.factorize(teacher.eval(), BUDGET, solver="regression", calibration=batches)
    two = makd.factorize(teacher.train(), BUDGET, solver="regression", calibration=batches)
    assert teacher.training
    assert makd.fingerprint(one) == makd.fingerprint(two)


def test_the_student_is_in_eval_mode_with_every_module():
    teacher = tiny("bert").train()
    student = makd.factorize(teacher, BUDGET, solver="regression", calibration=make_batches(teacher))
    assert not any(module.training for module in student.modules())


def test_the_teacher_and_its_cache_setting_are_as_before():
    teacher = tiny("llama", head="causal_lm")
    before = makd.fingerprint(teacher)
    assert teacher.config.use_cache
    makd.factorize(teacher, BUDGET, solver="regression", calibration=make_batches(teacher))
    assert teacher.config.use_cache
    assert makd.fingerprint(teacher) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_what_stands_in_the_padding_changes_nothing():
    teacher = tiny("bert")
    batches = make_batches(teacher)
    changed = [{**inputs, "input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 9)}
               for inputs in batches]  # fmt: skip
    one, two = (makd.factorize(teacher, BUDGET, solver="regression", calibration=rows) for rows in (batches, changed))
    for name in one.factorization.ranks:
        mine, theirs = (side.get_submodule(name).dense_weight() for side in (one, two))
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart", "albert"])
def test_two_stacks_and_shared_layers_are_refused_with_the_solver_to_take(name):
    teacher = tiny(name)
    with pytest.raises(makd.MakdError, match="Take solver 'two_sided', or 'whitened'"):
        makd.factorize(teacher, BUDGET, solver="regression", calibration=[batch(teacher)])


def test_later_layers_count_for_more_when_ranks_are_shared_out():
    anatomy = resolve(tiny("bert"))
    sensitivities = depth_sensitivities(anatomy)
    assert sensitivities.keys() == set(anatomy.linears)
    assert {sensitivities[linear.module] for linear in anatomy.layers[0].roles.values()} == {1.0}
    assert {sensitivities[linear.module] for linear in anatomy.layers[-1].roles.values()} == {TEXT_DEPTH_GAIN}


def test_held_out_batches_are_fitted_too_once_the_ridge_is_chosen(monkeypatch):
    teacher = tiny("bert")
    batches, seen = make_batches(teacher, HELD_OUT_EVERY), []

    def fit(linear, moments, rank, gradient_gram):
        parts = (moments.to_fit.rows, moments.held_out.rows)
        factors = fit_linear(linear, moments, rank, gradient_gram)
        seen.append((*parts, moments.to_fit.rows, moments.held_out))
        return factors

    monkeypatch.setattr("makd.factorization.fit.fit_linear", fit)
    fit_student(teacher, dict.fromkeys(resolve(teacher).linears, 8), batches)
    rows = [int(inputs["attention_mask"].sum()) for inputs in batches]
    assert set(seen) == {(sum(rows[:-1]), rows[-1], sum(rows), None)}


LARGEST = """
import resource, torch
from torch import nn
from makd.calibration.held_out import SplitMoments
from makd.calibration.moments import CrossMoments
from makd.factorization.allocator import giving_back
from makd.factorization.fit import fit_linear

def moments(rows):
    found = CrossMoments(2048, 512)
    inputs = torch.randn(rows, 2048)
    found.update_pairs(inputs, linear(inputs).detach())
    return found

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.manual_seed(0)
linear = nn.Linear(2048, 512, bias=False)
with giving_back():
    split, gram = SplitMoments(moments(512), moments(256)), torch.eye(512, dtype=torch.float64)
    before = peak()
    fit_linear(linear, split, 128, gram)
print((peak() - before) / 2**15)
"""
"""Float64 matrices of 2048 x 2048 that a fit takes beyond what making the moments took; 4.5 where it copied them."""


def test_a_fit_takes_little_beside_the_moments_of_a_wide_layer():
    found = subprocess.run([sys.executable, "-c", LARGEST], capture_output=True, text=True, check=True).stdout
    assert float(found) < 2


def test_no_batches_are_refused():
    with pytest.raises(makd.MakdError, match="at least one batch"):
        makd.factorize(tiny("bert"), BUDGET, solver="regression", calibration=[])
