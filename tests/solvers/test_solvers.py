"""Weight and statistics -> factors: each solver against its definition, by another way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from makd.calibration.moments import CrossMoments
from makd.errors import NumericsError
from makd.solvers import (
    choose_ridge,
    decompose_fisher,
    decompose_regression,
    decompose_svd,
    decompose_two_sided,
    decompose_whitened,
    fit_regression,
    regression,
)

SHAPES = [(12, 20), (20, 12), (16, 16)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(rows, features, seed=0):
    """Rows whose features are mixed, of different sizes, and off zero."""
    sizes = torch.logspace(-1.5, 1, features, dtype=torch.float64)
    return (normal(rows, features, seed=seed) * sizes) @ normal(features, features, seed=seed + 1) + 0.5


def gram(rows):
    return rows.T @ rows / len(rows)


def product(factors):
    return factors.expand @ factors.reduce


def output_error(weight, factors, rows):
    """Mean squared error of the outputs, measured on the rows."""
    return float(((weight - product(factors)) @ rows.T).square().sum()) / len(rows)


def truncated(matrix, rank):
    """The best of rank `rank`, by a full SVD of numpy."""
    left, values, right = np.linalg.svd(np.asarray(matrix), full_matrices=False)
    return torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11, 12])
class TestSvd:
    def test_its_product_is_the_truncated_svd(self, shape, rank):
        weight = normal(*shape)
        factors = decompose_svd(weight).factors(rank)
        assert (factors.expand.shape, factors.reduce.shape) == ((shape[0], rank), (rank, shape[1]))
        torch.testing.assert_close(product(factors), truncated(weight, rank))

    def test_its_error_is_the_energy_left_out_and_the_one_measured(self, shape, rank):
        weight = normal(*shape)
        factors = decompose_svd(weight).factors(rank)
        left_out = float(torch.linalg.svdvals(weight)[rank:].square().sum())  # Eckart & Young
        assert factors.squared_error == pytest.approx(left_out, abs=1e-10)
        assert factors.squared_error == pytest.approx(float((weight - product(factors)).square().sum()), abs=1e-10)
        assert factors.error == pytest.approx(left_out / float(weight.square().sum()), abs=1e-10)

    def test_singular_values_are_split_evenly(self, shape, rank):
        factors = decompose_svd(normal(*shape)).factors(rank)
        values = torch.linalg.svdvals(normal(*shape))[:rank]
        torch.testing.assert_close(factors.expand.T @ factors.expand, values.diag())
        torch.testing.assert_close(factors.reduce @ factors.reduce.T, values.diag())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12])
class TestWhitened:
    def test_its_error_is_the_one_measured_on_the_data(self, shape, rank):
        weight, rows = normal(*shape), correlated(200, shape[1])
        factors = decompose_whitened(weight, gram(rows)).factors(rank)
        measured = output_error(weight, factors, rows)
        power = float((weight @ rows.T).square().sum()) / len(rows)
        assert factors.squared_error == pytest.approx(measured, rel=1e-6, abs=1e-9 * power)
        assert factors.error == pytest.approx(measured / power, rel=1e-6, abs=1e-9)
        assert factors.fallback is None

    def test_its_product_is_the_truncated_svd_of_the_whitened_weight(self, shape, rank):
        weight, rows = normal(*shape), correlated(200, shape[1])
        energies, vectors = np.linalg.eigh(gram(rows).numpy())
        root = torch.from_numpy((vectors * np.sqrt(energies)) @ vectors.T)  # the symmetric root, not Cholesky's
        expected = truncated(weight @ root, rank) @ torch.linalg.inv(root)
        torch.testing.assert_close(
            product(decompose_whitened(weight, gram(rows)).factors(rank)), expected, rtol=1e-6, atol=1e-6
        )

    def test_it_is_no_worse_than_plain_svd_on_the_data(self, shape, rank):
        weight, rows = normal(*shape), correlated(200, shape[1])
        plain = decompose_svd(weight).factors(rank)
        factors = decompose_whitened(weight, gram(rows)).factors(rank)
        assert output_error(weight, factors, rows) <= output_error(weight, plain, rows) * (1 + 1e-9) + 1e-9

    def test_white_inputs_give_the_plain_svd(self, shape, rank):
        weight = normal(*shape)
        factors = decompose_whitened(weight, torch.eye(shape[1], dtype=torch.float64)).factors(rank)
        torch.testing.assert_close(product(factors), product(decompose_svd(weight).factors(rank)))


FAST = {
    "svd": lambda weight, gram_in, gram_out, rank: decompose_svd(weight, rank),
    "fisher": lambda weight, gram_in, gram_out, rank: decompose_fisher(weight, gram_out, rank),
    "whitened": lambda weight, gram_in, gram_out, rank: decompose_whitened(weight, gram_in, rank),
    "two_sided": lambda weight, gram_in, gram_out, rank: decompose_two_sided(weight, gram_in, gram_out, rank),
}


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestOnlyTheTermsThatAreNeeded:
    rank = 24

    def both(self, name, shape, dtype):
        weight = (normal(*shape) * torch.linspace(1, 0.2, shape[1])).to(dtype)
        grams = gram(correlated(500, shape[1], seed=2)), gram(correlated(500, shape[0], seed=4))
        return weight, grams, *(FAST[name](weight, *grams, rank) for rank in (self.rank, None))

    def test_their_error_is_within_a_hundredth_of_the_best(self, name, shape, dtype):
        _, _, few, every = self.both(name, shape, dtype)
        assert every.squared_error(self.rank) * 0.9999 <= few.squared_error(self.rank)
        assert few.squared_error(self.rank) <= 1.02 * every.squared_error(self.rank)  # 1.01, squared

    def test_their_error_is_measured_at_every_rank(self, name, shape, dtype):
        weight, _, few, every = self.both(name, shape, dtype)
        assert len(few.singular_values) == self.rank
        assert few.squared_error(0) == pytest.approx(every.squared_error(0), rel=1e-4)
        if name == "svd":
            for rank in (4, self.rank):
                left_out = weight.double() - product(few.factors(rank)).double()
                assert few.squared_error(rank) == pytest.approx(float(left_out.square().sum()), rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5, 4.0])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestSpectraThatFallSlowlyAndSteeply:
    rank = 24

    def decomposed(self, decay, shape, dtype):
        left, _ = torch.linalg.qr(normal(shape[0], min(shape)))
        right, _ = torch.linalg.qr(normal(shape[1], min(shape), seed=1))
        values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
        weight = ((left * values) @ right.T).to(dtype)
        terms = decompose_svd(weight, self.rank)
        return weight.double(), terms, float(torch.linalg.svdvals(weight.double())[self.rank :].norm())

    def test_error_is_within_a_hundredth_of_the_best(self, decay, shape, dtype):
        weight, terms, best = self.decomposed(decay, shape, dtype)
        error = float((weight - terms.left.double() @ terms.right.double()).norm())
        assert error <= 1.01 * best + 10 * torch.finfo(dtype).eps * float(weight.norm())

    def test_directions_are_orthonormal(self, decay, shape, dtype):
        _, terms, _ = self.decomposed(decay, shape, dtype)
        left = terms.left.double()
        assert (left.T @ left - torch.eye(self.rank)).abs().max() < 1e-3

    def test_error_is_known(self, decay, shape, dtype):
        weight, terms, _ = self.decomposed(decay, shape, dtype)
        error = float((weight - terms.left.double() @ terms.right.double()).norm())
        assert terms.squared_error(self.rank) ** 0.5 == pytest.approx(error, rel=1e-2, abs=1e-5 * float(weight.norm()))


class TestFisher:
    weight, gradients = normal(12, 20), correlated(300, 12, seed=5)

    def rows_error(self, factors):
        """The weighted error, from the definition."""
        importance = gram(self.gradients).diagonal()
        importance = importance + 1e-3 * importance.mean()
        return float((importance[:, None] * (self.weight - product(factors)).square()).sum())

    @pytest.mark.parametrize("rank", [1, 5, 12])
    def test_its_error_is_the_weighted_one_of_the_definition(self, rank):
        factors = decompose_fisher(self.weight, gram(self.gradients)).factors(rank)
        assert factors.squared_error == pytest.approx(self.rows_error(factors), rel=1e-8, abs=1e-9)

    @pytest.mark.parametrize("rank", [1, 5])
    def test_it_beats_plain_svd_in_its_own_norm(self, rank):
        fisher = decompose_fisher(self.weight, gram(self.gradients)).factors(rank)
        assert self.rows_error(fisher) < self.rows_error(decompose_svd(self.weight).factors(rank))

    def test_rows_of_one_importance_give_the_plain_svd(self):
        fisher = decompose_fisher(self.weight, torch.eye(12, dtype=torch.float64)).factors(4)
        torch.testing.assert_close(product(fisher), truncated(self.weight, 4))

    def test_without_gradients_it_is_the_plain_svd_and_says_so(self):
        fisher = decompose_fisher(self.weight, torch.zeros(12, 12, dtype=torch.float64)).factors(4)
        torch.testing.assert_close(product(fisher), truncated(self.weight, 4))
        assert "zero in all of the text" in fisher.fallback

    def test_gradients_that_are_not_finite_are_refused(self):
        with pytest.raises(NumericsError, match="NaN or infinity"):
            decompose_fisher(self.weight, torch.full((12, 12), float("nan"), dtype=torch.float64))


@pytest.mark.parametrize("fit_bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_the_ridge_is_the_one_whose_fit_errs_least_on_held_out_rows(fit_bias, weighted, noise, monkeypatch):
    """Of ridges that lie close together, so that another weight, bias or size of the ridge would choose another one."""
    monkeypatch.setattr(regression, "COLUMNS", 5)
    weight, mix = normal(6, 12), normal(6, 6, seed=8)
    inputs = correlated(60, 12, seed=2)
    targets = inputs @ (weight + 0.3 * normal(6, 12, seed=4)).T + noise * normal(60, 6, seed=3) + 1
    seen, unseen = slice(0, 30), slice(30, 60)
    moments, held_out = CrossMoments(12, 6), CrossMoments(12, 6)
    moments.update_pairs(inputs[seen], targets[seen])
    held_out.update_pairs(inputs[unseen], targets[unseen])
    metric = mix @ mix.T if weighted else torch.eye(6, dtype=torch.float64)
    x_mean, y_mean = (side[seen].mean(0) if fit_bias else 0 for side in (inputs, targets))
    x, y = inputs - x_mean, targets - y_mean
    errors = {}
    for ridge in torch.logspace(-6, 0, 61, dtype=torch.float64).tolist():
        pull = (30 * ridge * float(x[seen].square().mean())) ** 0.5
        rows = torch.cat([x[seen], pull * torch.eye(12, dtype=torch.float64)])
        solved = torch.linalg.lstsq(rows, torch.cat([y[seen], pull * weight.T])).solution
        residual = y[unseen] - x[unseen] @ solved
        errors[ridge] = float(((residual @ metric) * residual).sum())
    chosen = choose_ridge(
        weight, moments, held_out, fit_bias=fit_bias, gradient_gram=metric if weighted else None, ridges=tuple(errors)
    )
    assert min(errors) < chosen < max(errors)
    assert chosen == min(errors, key=errors.__getitem__)


def test_whitened_loses_nothing_on_inputs_of_few_directions():
    weight, rows = normal(16, 16), normal(200, 3) @ normal(3, 16, seed=1)
    factors = decompose_whitened(weight, gram(rows)).factors(3)
    assert output_error(weight, factors, rows) < 1e-9 * output_error(0 * weight, factors, rows)
    assert "not positive definite" in factors.fallback


@given(
    rows=st.integers(1, 15), dead=st.integers(0, 15), shape=st.sampled_from(SHAPES), rank=st.integers(1, 12),
    seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=60)
def test_with_too_few_rows_or_dead_inputs_whitened_is_still_no_worse_than_plain_svd_and_says_so(
    rows, dead, shape, rank, seed
):
    weight, seen = normal(*shape, seed=seed), correlated(rows, shape[1], seed=seed)
    seen[:, :dead] = 0
    factors = decompose_whitened(weight, gram(seen)).factors(rank)
    plain = decompose_svd(weight).factors(rank)
    power = float((weight @ seen.T).square().sum()) / rows
    assert torch.isfinite(product(factors)).all()
    assert output_error(weight, factors, seen) <= output_error(weight, plain, seen) + 1e-10 * power
    if rows < shape[1] or dead:
        assert factors.fallback
        # predicted with the ridge, so never below what is measured
        assert factors.squared_error >= output_error(weight, factors, seen) - 1e-10 * power


def test_inputs_that_never_were_give_the_plain_svd_and_say_so():
    weight = normal(12, 20)
    factors = decompose_whitened(weight, torch.zeros(20, 20)).factors(5)
    torch.testing.assert_close(product(factors), product(decompose_svd(weight).factors(5)))
    assert "zero in all of the calibration text" in factors.fallback


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_or_weights_that_are_not_finite_are_refused(value):
    weight, good = normal(4, 4), gram(normal(20, 4))
    bad = good.clone()
    bad[1, 2] = value
    for solve in (
        lambda: decompose_svd(bad),
        lambda: decompose_whitened(weight, bad),
        lambda: decompose_whitened(bad, good),
        lambda: decompose_two_sided(weight, bad, good),
        lambda: decompose_two_sided(weight, good, bad),
    ):
        with pytest.raises(NumericsError, match="NaN or infinity"):
            solve()


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (96, 384)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 4.0])
def test_errors_are_those_of_a_full_svd_at_every_rank(shape, decay):
    """Eigenvectors of a Gram matrix are faster than an SVD; this is what they must not cost."""
    small = min(shape)
    left, _ = torch.linalg.qr(normal(shape[0], small))
    right, _ = torch.linalg.qr(normal(shape[1], small, seed=1))
    values = torch.arange(1, small + 1, dtype=torch.float64).pow(-decay)
    weight = (left * values) @ right.T
    terms = decompose_svd(weight)
    for rank in (1, 8, 40, 80, small - 1):
        best = float(values[rank:].square().sum())
        assert float((weight - product(terms.factors(rank))).square().sum()) <= 1.001 * best + 1e-12


class TestTwoSided:
    weight = normal(12, 20)
    gram_in = gram(correlated(300, 20))
    gram_out = gram(correlated(300, 12, seed=5))

    def error(self, matrix):
        difference = self.weight - matrix
        return (self.gram_out @ difference @ self.gram_in @ difference.T).trace()

    @pytest.mark.parametrize("rank", [1, 4, 12])
    def test_its_error_is_the_one_of_the_definition(self, rank):
        factors = decompose_two_sided(self.weight, self.gram_in, self.gram_out, ridge=0.0).factors(rank)
        assert factors.squared_error == pytest.approx(
            float(self.error(product(factors))), rel=1e-6, abs=1e-9 * float(self.error(0 * self.weight))
        )

    @pytest.mark.parametrize("rank", [1, 4])
    def test_its_product_is_the_truncated_svd_between_symmetric_roots(self, rank):
        roots = []
        for moments in (self.gram_out, self.gram_in):
            energies, vectors = np.linalg.eigh(moments.numpy())
            roots.append(torch.from_numpy((vectors * np.sqrt(energies)) @ vectors.T))
        out, inp = roots
        expected = torch.linalg.inv(out) @ truncated(out @ self.weight @ inp, rank) @ torch.linalg.inv(inp)
        factors = decompose_two_sided(self.weight, self.gram_in, self.gram_out, ridge=0.0).factors(rank)
        torch.testing.assert_close(product(factors), expected, rtol=1e-6, atol=1e-6)

    def test_no_change_of_its_factors_is_better(self):
        factors = decompose_two_sided(self.weight, self.gram_in, self.gram_out, ridge=0.0).factors(4)
        expand, reduce = factors.expand.requires_grad_(), factors.reduce.requires_grad_()
        error = self.error(expand @ reduce)
        gradients = torch.autograd.grad(error, (expand, reduce))
        at_random = torch.autograd.grad(self.error(0.9 * expand @ reduce), (expand, reduce))
        for gradient, size in zip(gradients, at_random, strict=True):
            assert float(gradient.norm()) < 1e-7 * float(size.norm())
        for seed in range(20):
            for scale in (1e-3, 1e-1, 1.0):
                changed = (expand + scale * normal(12, 4, seed=seed)) @ (reduce + scale * normal(4, 20, seed=seed + 1))
                assert self.error(changed) > error

    def test_it_beats_whitened_and_svd_in_its_own_norm(self):
        errors = [
            float(self.error(product(terms.factors(4))))
            for terms in (
                decompose_two_sided(self.weight, self.gram_in, self.gram_out, ridge=0.0),
                decompose_whitened(self.weight, self.gram_in),
                decompose_svd(self.weight),
            )
        ]
        assert errors[0] < 0.99 * min(errors[1:])

    def test_white_gradients_give_the_whitened_solution(self):
        factors = decompose_two_sided(self.weight, self.gram_in, 3 * torch.eye(12, dtype=torch.float64)).factors(4)
        torch.testing.assert_close(product(factors), product(decompose_whitened(self.weight, self.gram_in).factors(4)))

    def test_its_ridge_is_part_of_the_norm_in_which_it_is_the_best(self):
        ridged = self.gram_out + 0.5 * self.gram_out.diagonal().mean() * torch.eye(12, dtype=torch.float64)
        one = decompose_two_sided(self.weight, self.gram_in, self.gram_out, ridge=0.5).factors(4)
        two = decompose_two_sided(self.weight, self.gram_in, ridged, ridge=0.0).factors(4)
        torch.testing.assert_close(product(one), product(two))
        assert one.squared_error == pytest.approx(two.squared_error)

    def test_without_gradients_it_is_the_whitened_solution_and_says_so(self):
        factors = decompose_two_sided(self.weight, self.gram_in, torch.zeros(12, 12)).factors(4)
        torch.testing.assert_close(product(factors), product(decompose_whitened(self.weight, self.gram_in).factors(4)))
        assert "gradients of its outputs were zero" in factors.fallback

    def test_moments_that_are_not_definite_are_told_apart(self):
        flat_in, flat_out = gram(correlated(5, 20)), gram(correlated(5, 12))
        told = {
            (one, two): decompose_two_sided(self.weight, first, second, ridge=0.0).factors(4).fallback
            for one, first in (("in", flat_in), ("", self.gram_in))
            for two, second in (("out", flat_out), ("", self.gram_out))
        }
        assert told["", ""] is None
        assert "its inputs" in told["in", ""]
        assert "gradients" not in told["in", ""]
        assert "gradients of its outputs" in told["", "out"]
        assert "its inputs" in told["in", "out"]
        assert "gradients of its outputs" in told["in", "out"]


class TestRegression:
    """Teacher's inputs, and a student's that are distorted by what was factored before."""

    weight = normal(12, 20)
    bias = normal(12, seed=3)
    teacher_inputs = correlated(400, 20)
    student_inputs = teacher_inputs @ (torch.eye(20, dtype=torch.float64) + 0.2 * normal(20, 20, seed=7)) + 1.0
    targets = teacher_inputs @ weight.T + bias + 0.1 * normal(400, 12, seed=8)

    def moments(self, inputs=None):
        moments = CrossMoments(20, 12)
        moments.update_pairs(self.student_inputs if inputs is None else inputs, self.targets)
        return moments

    def error(self, factors, bias, inputs=None):
        inputs = self.student_inputs if inputs is None else inputs
        return float((self.targets - inputs @ product(factors).T - bias).square().sum()) / len(inputs)

    @pytest.mark.parametrize("rank", [1, 4, 12])
    def test_it_is_the_classical_reduced_rank_regression(self, rank):
        inputs, targets = self.student_inputs.numpy(), self.targets.numpy()
        inputs_centred, targets_centred = inputs - inputs.mean(0), targets - targets.mean(0)
        full, *_ = np.linalg.lstsq(inputs_centred, targets_centred, rcond=None)
        _, _, directions = np.linalg.svd(inputs_centred @ full, full_matrices=False)
        expected = (full @ directions[:rank].T @ directions[:rank]).T
        factors = decompose_regression(self.weight, self.moments(), ridge=0.0).factors(rank)
        torch.testing.assert_close(product(factors), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)
        expected_bias = torch.from_numpy(targets.mean(0) - expected @ inputs.mean(0))
        torch.testing.assert_close(factors.bias, expected_bias, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("ridge", [1e-3, 0.1, 1.0])
    def test_a_ridge_pulls_to_the_teachers_weight_by_that_share_of_the_inputs_mean_variance(self, ridge):
        """As rows that say so would: least squares on the data and them."""
        inputs, targets = self.student_inputs.numpy(), self.targets.numpy()
        inputs, targets = inputs - inputs.mean(0), targets - targets.mean(0)
        pull = np.sqrt(400 * ridge * np.square(inputs).mean()) * np.eye(20)
        expected, *_ = np.linalg.lstsq(
            np.vstack([inputs, pull]), np.vstack([targets, pull @ self.weight.numpy().T]), rcond=None
        )
        factors = fit_regression(self.weight, self.moments(), 12, ridge=ridge)
        torch.testing.assert_close(product(factors), torch.from_numpy(expected.T), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("rank", [1, 4, 12])
    @pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
    def test_its_error_is_the_one_measured(self, rank, ridge):
        factors = decompose_regression(self.weight, self.moments(), ridge=ridge).factors(rank)
        variance = float((self.targets - self.targets.mean(0)).square().sum()) / 400
        assert factors.squared_error == pytest.approx(self.error(factors, factors.bias), rel=1e-6)
        assert factors.error == pytest.approx(factors.squared_error / variance)

    @pytest.mark.parametrize("rank", [1, 4, 12])
    def test_without_a_bias_its_error_is_still_the_one_measured(self, rank):
        factors = fit_regression(self.weight, self.moments(), rank, fit_bias=False)
        assert factors.bias is None
        assert factors.squared_error == pytest.approx(self.error(factors, 0.0), rel=1e-6)

    @pytest.mark.parametrize("rank", [2, 6, 12])
    def test_on_the_students_inputs_it_beats_whitened_on_the_teachers_and_on_the_students(self, rank):
        fitted = fit_regression(self.weight, self.moments(), rank)
        for inputs in (self.teacher_inputs, self.student_inputs):
            whitened = decompose_whitened(self.weight, gram(inputs)).factors(rank)
            assert self.error(fitted, fitted.bias) < 0.9 * self.error(whitened, self.bias)

    def test_output_gradients_weigh_the_errors(self):
        exact = CrossMoments(20, 12)
        exact.update_pairs(self.teacher_inputs, self.teacher_inputs @ self.weight.T + self.bias)
        gradients = gram(correlated(300, 12, seed=5))
        factors = fit_regression(self.weight, exact, 4, gradient_gram=gradients)
        expected = decompose_two_sided(self.weight, exact.covariance, gradients).factors(4)
        torch.testing.assert_close(product(factors), product(expected), rtol=1e-5, atol=1e-5)
        bias = exact.target_mean - product(factors) @ exact.mean
        torch.testing.assert_close(factors.bias, bias)
        assert factors.error == pytest.approx(expected.error)

    def test_where_student_and_teacher_read_the_same_a_ridge_costs_nothing(self):
        exact = CrossMoments(20, 12)
        exact.update_pairs(self.teacher_inputs, self.teacher_inputs @ self.weight.T + self.bias)
        factors = fit_regression(self.weight, exact, 12, ridge=10.0)
        torch.testing.assert_close(product(factors), self.weight)
        torch.testing.assert_close(factors.bias, self.bias)

    def test_a_strong_ridge_gives_the_teachers_weight(self):
        factors = fit_regression(self.weight, self.moments(), 12, ridge=1e9)
        torch.testing.assert_close(product(factors), self.weight, rtol=1e-5, atol=1e-5)

    def test_inputs_that_never_vary_keep_the_teachers_weight_and_fit_the_bias(self):
        inputs = torch.ones(400, 20, dtype=torch.float64)
        factors = fit_regression(self.weight, self.moments(inputs), 12)
        torch.testing.assert_close(product(factors), self.weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(factors.bias + product(factors).sum(1), self.targets.mean(0))
        assert factors.fallback

    def test_fewer_rows_than_inputs_are_said_and_give_a_finite_answer(self):
        moments = CrossMoments(20, 12)
        moments.update_pairs(self.student_inputs[:7], self.targets[:7])
        factors = fit_regression(self.weight, moments, 4)
        assert torch.isfinite(product(factors)).all()
        assert "not positive definite" in factors.fallback

    def test_moments_that_cannot_be_inverted_without_a_ridge_are_refused(self):
        with pytest.raises(NumericsError, match="cannot be inverted"):
            fit_regression(self.weight, self.moments(torch.zeros(400, 20, dtype=torch.float64)), 4, ridge=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_have_the_weights_dtype_and_its_precision(dtype):
    weight, rows = normal(12, 20).to(dtype), correlated(200, 20)
    moments = CrossMoments(20, 12)
    moments.update_pairs(rows, rows @ weight.double().T)
    for factors in (
        decompose_svd(weight).factors(12),
        decompose_whitened(weight, gram(rows)).factors(12),
        decompose_two_sided(weight, gram(rows), gram(correlated(200, 12))).factors(12),
        fit_regression(weight, moments, 12),
    ):
        assert {factors.expand.dtype, factors.reduce.dtype} == {dtype}
        assert factors.bias is None or factors.bias.dtype == dtype
        # 12 products of two rounded numbers each
        close = 12 * torch.finfo(dtype).eps * float(factors.expand.abs().max() * factors.reduce.abs().max())
        assert float((factors.expand.double() @ factors.reduce.double() - weight.double()).abs().max()) < close


def test_one_decomposition_serves_every_rank():
    weight, rows = normal(12, 20), correlated(200, 20)
    terms = decompose_whitened(weight, gram(rows))
    for rank in range(1, 12):
        smaller, larger = terms.factors(rank), terms.factors(rank + 1)
        torch.testing.assert_close(larger.expand[:, :rank], smaller.expand)
        torch.testing.assert_close(larger.reduce[:rank], smaller.reduce)
        assert larger.error < smaller.error
        lost = smaller.squared_error - larger.squared_error
        assert lost == pytest.approx(float(terms.singular_values[rank]) ** 2, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rank", [1, 5])
def test_each_column_of_the_expanding_factor_is_as_long_as_what_flows_into_it_is_large(rank):
    weight, rows = normal(12, 20), correlated(200, 20)
    moments = CrossMoments(20, 12)
    moments.update_pairs(rows, rows @ weight.T)
    for factors in (
        decompose_whitened(weight, gram(rows)).factors(rank),
        decompose_two_sided(weight, gram(rows), gram(correlated(200, 12))).factors(rank),
        fit_regression(weight, moments, rank, fit_bias=False),
    ):
        flowing = (rows @ factors.reduce.T).square().mean(0).sqrt()
        torch.testing.assert_close(factors.expand.norm(dim=0), flowing, rtol=1e-6, atol=1e-6)


def test_a_weight_of_zeros_has_factors_of_zeros_without_error():
    factors = decompose_svd(torch.zeros(6, 8)).factors(3)
    assert not product(factors).any()
    assert factors.error == factors.squared_error == 0


def test_a_weight_of_low_rank_is_given_back_at_that_rank_and_above():
    weight = normal(20, 3) @ normal(3, 12, seed=1)
    for terms in (decompose_svd(weight), decompose_whitened(weight, gram(correlated(200, 12)))):
        for rank in (3, 7, 12):
            torch.testing.assert_close(product(terms.factors(rank)), weight)


@pytest.mark.parametrize("rank", [0, 13, -1])
def test_a_rank_that_the_weight_does_not_have_is_refused(rank):
    with pytest.raises(ValueError, match=rf"1\.\.12; got {rank}"):
        decompose_svd(normal(12, 20)).factors(rank)
