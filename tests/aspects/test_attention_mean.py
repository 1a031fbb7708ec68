"""attention_loss against the mean of plain log-softmax's KL in float64."""

import pytest
import torch

from makd.aspects import attention_kl, attention_loss, attention_mean, attention_tiles
from tests.aspects.test_attention import LargestTensor, additive, inputs, padding, reference_kl

REAL = padding()[:, 0, 0]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles even for tiny inputs: a few rows each, of one head of one text."""
    monkeypatch.setattr(attention_tiles, "_LEAST_ROWS", 4)
    monkeypatch.setattr(attention_mean, "_CPU_TILE_ELEMENTS", 128)


def mean_of(kl, real=None):
    return kl.mean() if real is None else torch.where(real[:, None], kl, 0).sum() / (real.sum() * kl.shape[1])


def assert_like_reference(tensors, *args, real=None, mask_student=None, rtol=1e-5, **settings):
    got = attention_loss(*tensors, real, *args, attention_mask_student=mask_student, **settings)
    expected = mean_of(reference_kl(*tensors, *args, mask_student=mask_student, **settings), real)
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=rtol)
    learned = [tensor for tensor in (*tensors, mask_student) if tensor is not None and tensor.requires_grad]
    slopes, wanted = torch.autograd.grad(3 * got, learned), torch.autograd.grad(3 * expected, learned)
    for slope, want in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(slope.double(), want.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("real", [None, REAL], ids=["all rows", "real rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestAgreesWithLogSoftmax:
    @pytest.fixture
    def rtol(self, dtype):
        return 1e-5 if dtype == torch.float32 else 1e-11

    def test_without_a_mask(self, dtype, real, rtol):
        assert_like_reference(inputs(dtype=dtype), real=real, rtol=rtol)

    def test_with_padding(self, dtype, real, rtol):
        assert_like_reference(inputs(dtype=dtype), padding(), real=real, rtol=rtol)

    def test_causal_with_additive_padding(self, dtype, real, rtol):
        mask = additive(padding(), torch.finfo(torch.float32).min)
        assert_like_reference(inputs(dtype=dtype), mask, True, real=real, rtol=rtol)

    def test_grouped_heads_that_differ_between_the_sides_and_a_softcap(self, dtype, real, rtol):
        query, _, ours, our_key = inputs(key_heads=2, dtype=dtype)
        _, key, *_ = inputs(key_heads=1, dtype=dtype, seed=1)
        assert_like_reference((query, key, ours, our_key), padding(), real=real, softcap=0.5, rtol=rtol)

    @pytest.mark.parametrize("shape", [(1, 4, 11, 11), (2, 1, 11, 1)])
    def test_the_student_s_own_mask_gets_its_gradient(self, dtype, real, rtol, shape):
        generator = torch.Generator().manual_seed(5)
        bias = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        theirs = torch.randn(1, 4, 11, 11, generator=generator, dtype=dtype)
        shown = additive(padding(), -1e9)
        assert_like_reference(
            inputs(key_heads=2, dtype=dtype), theirs + shown, real=real, mask_student=bias + shown, rtol=rtol
        )

    def test_heads_of_another_size(self, dtype, real, rtol):
        assert_like_reference(inputs(student_dim=6, dtype=dtype), padding(), real=real, rtol=rtol)


def test_is_the_mean_of_attention_kl():
    tensors = inputs()
    expected = mean_of(attention_kl(*tensors, padding(), method="tiles"), REAL)
    torch.testing.assert_close(attention_loss(*tensors, REAL, padding()), expected, rtol=1e-5, atol=1e-6)


def test_what_stands_in_padded_queries_has_no_influence():
    tensors = inputs()
    expected = attention_loss(*tensors, REAL, padding())
    slopes = torch.autograd.grad(expected, tensors[2:])
    for query in (tensors[0], tensors[2]):
        query.data.transpose(1, 2)[~REAL] = torch.nan
    got = attention_loss(*tensors, REAL, padding())
    torch.testing.assert_close(got, expected)
    for slope, wanted in zip(torch.autograd.grad(got, tensors[2:]), slopes, strict=True):
        torch.testing.assert_close(slope, wanted)


def test_with_no_real_query_it_is_0_and_so_is_its_gradient():
    tensors = inputs()
    loss = attention_loss(*tensors, torch.zeros_like(REAL), padding())
    assert loss == 0
    assert not any(slope.any() for slope in torch.autograd.grad(loss, tensors[2:]))


def test_queries_that_see_nothing_count_as_0():
    mask = torch.ones(2, 1, 11, 11, dtype=torch.bool)
    mask[0, 0, 4] = False
    tensors = inputs()
    loss = attention_loss(*tensors, None, mask)
    torch.testing.assert_close(loss, attention_kl(*tensors, mask, method="tiles").mean(), rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(loss, tensors[2])
    assert not slope[0, :, 4].any()


def test_keeps_two_tensors_for_the_backward_and_nothing_of_the_teacher_s():
    kept = []
    tensors = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        attention_loss(*tensors, REAL, padding())
    assert sorted(tensor.numel() for tensor in kept) == sorted([1, tensors[2].numel(), tensors[3].numel()])
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in kept}


def test_no_attention_matrix_is_made(monkeypatch):
    monkeypatch.undo()
    tokens = 2048
    tensors = inputs(batch=1, heads=2, key_heads=1, queries=tokens, keys=tokens, dim=16)
    with LargestTensor() as largest:
        attention_loss(*tensors, padding(tokens)[1:, 0, 0], padding(tokens)[1:]).backward()
    assert 0 < largest.elements <= tokens * tokens / 8


def test_heads_that_do_not_divide_are_refused():
    query, key, ours, _ = inputs(key_heads=4)
    with pytest.raises(ValueError, match="do not divide"):
        attention_loss(query, key, ours, key[:, :3], None)
