"""Streamed second moments equal those of all rows at once."""

import pytest
import torch

from makd.calibration.moments import PRODUCT_ROWS, CrossMoments, InputMoments
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


def same(one, two):
    one, two = one.to_tensors(), two.to_tensors()
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


@pytest.mark.parametrize("make", [lambda: seen(rows()), lambda: crossed((rows(), rows(features=3)))])
def test_moments_survive_a_file_and_go_on(make, tmp_path):
    moments = make()
    torch.save(moments.to_tensors(), tmp_path / "moments.pt")
    read = type(moments).from_tensors(torch.load(tmp_path / "moments.pt"))
    same(read, moments)
    assert type(read) is type(moments)
    read.merge(moments)
    assert read.rows == 2 * moments.rows


def test_tensors_are_a_copy():
    moments = seen(rows())
    tensors = moments.to_tensors()
    before = tensors["products"].clone()
    moments.update(rows())
    assert torch.equal(tensors["products"], before)


def test_tensors_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="not the tensors of moments"):
        InputMoments.from_tensors({"weight": torch.ones(2)})
    with pytest.raises(ValueError, match="not the tensors of cross moments"):
        CrossMoments.from_tensors(seen(rows()).to_tensors())
    with pytest.raises(ValueError, match="InputMoments are"):
        InputMoments.from_tensors(crossed((rows(), rows(features=3))).to_tensors())


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
