"""Streamed second moments equal those of all rows at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from makd.calibration.moments import PRODUCT_ROWS, SMALLEST_SQUARE, CrossMoments, InputMoments, PairMoments
from makd.errors import NumericsError


def rows(count=500, features=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return (mixed @ torch.randn(features, features, generator=generator, dtype=torch.float64) + 3).to(dtype)


def seen(*parts):
    moments = InputMoments(parts[0].shape[1])
    for part in parts:
        moments.update(part)
    return moments


def crossed(*pairs):
    moments = CrossMoments(pairs[0][0].shape[1], pairs[0][1].shape[1])
    for inputs, targets in pairs:
        moments.update_pairs(inputs, targets)
    return moments


def sums(moments):
    return {"rows": torch.tensor(moments.rows), **moments._sums()}


def same(one, two):
    one, two = sums(one), sums(two)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_moments_are_those_of_the_definition():
    inputs = rows()
    moments = seen(inputs)
    torch.testing.assert_close(moments.gram, sum(torch.outer(row, row) for row in inputs) / 500)
    torch.testing.assert_close(moments.mean, inputs.mean(0))
    torch.testing.assert_close(moments.covariance, torch.cov(inputs.T, correction=0))
    assert moments.rows == 500


def test_rows_in_pieces_give_what_all_at_once_give():
    inputs = rows()
    same(seen(inputs), seen(inputs[:1], inputs[1:300], inputs[300:300], inputs[300:]))


def test_merged_moments_are_those_of_all_rows():
    inputs = rows()
    merged = seen(inputs[:200])
    merged.merge(seen(inputs[200:]))
    same(merged, seen(inputs))


def test_moments_of_different_sizes_or_kinds_do_not_merge():
    with pytest.raises(ValueError, match="12 features and InputMoments of 5 features do not add up"):
        seen(rows()).merge(seen(rows(features=5)))
    with pytest.raises(ValueError, match="do not add up"):
        crossed((rows(), rows(features=3))).merge(seen(rows()))
    with pytest.raises(ValueError, match=r"3 targets and .* 4 targets"):
        crossed((rows(), rows(features=3))).merge(crossed((rows(), rows(features=4))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_lose_nothing_that_counts(dtype):
    # features of very different sizes, as in language models, where a few are a thousand times larger than the rest
    inputs = (rows(3 * PRODUCT_ROWS) * torch.logspace(-2, 1, 12, dtype=torch.float64)).to(dtype)
    wide = inputs.to(torch.float64)
    exact = wide.T @ wide / len(wide)
    own_size = exact.diagonal().sqrt()
    error = (seen(inputs).gram - exact) / torch.outer(own_size, own_size)
    assert seen(inputs).gram.dtype == torch.float64
    assert float(error.abs().max()) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite_or_overflow_are_refused_and_leave_no_trace(value):
    inputs = rows(dtype=torch.float32)
    moments = seen(inputs)
    poisoned = inputs.clone()
    poisoned[7, 3] = value
    with pytest.raises(NumericsError, match="activations"):
        moments.update(poisoned)
    same(moments, seen(inputs))


@pytest.mark.parametrize("place", ["inputs", "targets"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pairs_that_are_not_finite_are_refused_and_leave_no_trace(place, value):
    pair = {"inputs": rows(dtype=torch.float32), "targets": rows(features=3, dtype=torch.float32)}
    moments = crossed((pair["inputs"], pair["targets"]))
    poisoned = {name: tensor.clone() for name, tensor in pair.items()}
    poisoned[place][7, 1] = value
    with pytest.raises(NumericsError, match="activations"):
        moments.update_pairs(poisoned["inputs"], poisoned["targets"])
    same(moments, crossed((pair["inputs"], pair["targets"])))


def test_no_rows_have_no_mean():
    for name in ("gram", "mean", "covariance"):
        with pytest.raises(ValueError, match="No rows"):
            getattr(InputMoments(3), name)


def test_cross_moments_are_those_of_the_definition():
    inputs, targets = rows(), rows(features=3, seed=1)
    moments = crossed((inputs, targets))
    torch.testing.assert_close(moments.cross, targets.T @ inputs / 500)
    both = torch.cov(torch.cat([targets, inputs], dim=1).T, correction=0)
    torch.testing.assert_close(moments.cross_covariance, both[:3, 3:])
    torch.testing.assert_close(moments.covariance, both[3:, 3:])
    torch.testing.assert_close(moments.target_mean, targets.mean(0))
    assert moments.target_power == pytest.approx(float(targets.square().sum(1).mean()))
    assert moments.target_variance == pytest.approx(float(both[:3, :3].trace()))


def test_pairs_in_pieces_and_merged_give_what_all_at_once_give():
    inputs, targets = rows(), rows(features=3, seed=1)
    whole = crossed((inputs, targets))
    same(crossed((inputs[:123], targets[:123]), (inputs[123:], targets[123:])), whole)
    merged = crossed((inputs[:123], targets[:123]))
    merged.merge(crossed((inputs[123:], targets[123:])))
    same(merged, whole)


def test_inputs_without_targets_are_refused():
    with pytest.raises(TypeError, match="update_pairs"):
        CrossMoments(12, 3).update(rows())


@settings(max_examples=40)
@given(
    count=st.integers(1, 40),
    features=st.integers(1, 9),
    out=st.integers(1, 9),
    has_bias=st.booleans(),
    cut=st.integers(0, 40),
    seed=st.integers(0, 5),
)
def test_pairs_of_inputs_say_all_of_the_teachers_outputs(count, features, out, has_bias, cut, seed):
    student, teacher = rows(count, features, seed=seed), rows(count, features, seed=seed + 100)
    weight = rows(out, features, seed=seed + 200)
    bias = rows(1, out, seed=seed + 300)[0] if has_bias else None
    pairs = PairMoments(features)
    for part in (slice(None, cut), slice(cut, None)):
        if len(student[part]):
            pairs.update_pairs(student[part], teacher[part])
    outputs = teacher @ weight.T + (0 if bias is None else bias)
    found, expected = sums(pairs.of_outputs(weight, bias)), sums(crossed((student, outputs)))
    assert found.keys() == expected.keys()
    assert found.pop("target_squares").isnan().all(), "inputs do not say them"
    for name in found:
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10 * scale)


def test_merged_pairs_are_those_of_all_rows():
    student, teacher = rows(), rows(seed=1)
    merged, other, whole = (PairMoments(12) for _ in range(3))
    merged.update_pairs(student[:100], teacher[:100])
    other.update_pairs(student[100:], teacher[100:])
    merged.merge(other)
    whole.update_pairs(student, teacher)
    same(merged, whole)
    one, other = (pairs.of_outputs(rows(5), None) for pairs in (merged, whole))
    torch.testing.assert_close(one.cross, other.cross)
    torch.testing.assert_close(one.target_mean, other.target_mean)


def test_pairs_that_overflow_are_refused_and_leave_no_trace():
    pairs = PairMoments(3)
    with pytest.raises(NumericsError, match="activations"):
        pairs.update_pairs(torch.full((2, 3), 1e30), torch.full((2, 3), 1e-9))
    assert pairs.rows == 0
    assert not any(tensor.any() for tensor in sums(pairs).values())


def test_pairs_of_other_sizes_are_refused():
    with pytest.raises((ValueError, TypeError)):  # type checks, where they are on, are first
        PairMoments(3).update_pairs(torch.ones(5, 3), torch.ones(4, 3))


@pytest.mark.parametrize("features", [SMALLEST_SQUARE - 1, SMALLEST_SQUARE, SMALLEST_SQUARE + 1, 700])
def test_symmetric_products_are_the_plain_ones_and_exactly_symmetric(features):
    inputs = torch.randn(50, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = seen(inputs).gram
    torch.testing.assert_close(gram, inputs.T @ inputs / 50)
    assert torch.dist(gram, gram.T) < 1e-12 * gram.norm()


@pytest.mark.parametrize("centred", [True, False])
def test_columns_are_those_of_the_moments_about_the_means_of_other_rows(centred):
    generator = torch.Generator().manual_seed(3)
    rows, others = ([torch.randn(count, width, generator=generator).double() + 2 for width in (7, 3)]
                    for count in (40, 60))  # fmt: skip
    moments, about = CrossMoments(7, 3), CrossMoments(7, 3)
    moments.update_pairs(*rows)
    about.update_pairs(*others)
    x, y = (side - other.mean(0) * centred for side, other in zip(rows, others, strict=True))
    for columns in (slice(0, 4), slice(4, 8)):
        own, cross = moments.columns_about(about if centred else None, columns)
        torch.testing.assert_close(own, (x.T @ x / 40)[:, columns], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(cross, (y.T @ x / 40)[:, columns], rtol=1e-12, atol=1e-12)
