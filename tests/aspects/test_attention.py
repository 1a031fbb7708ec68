"""attention_kl against plain log-softmax in float64, by tiles and by kernel."""

import logging

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from makd.aspects import attention, attention_kl, attention_tiles
from makd.aspects.attention_kernels import attend, transpose_attend

BOTH_METHODS = pytest.mark.parametrize("method", ["tiles", "kernel"])


def probabilities(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """log P (batch, heads, queries, keys) in float64, with minus infinity at masked keys."""
    query, key = query.double(), key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
    return scores.log_softmax(-1)


def reference_kl(q_t, k_t, q_s, k_s, mask=None, is_causal=False, scale=None, *, mask_student=None, softcap=None):
    log_t = probabilities(q_t.detach(), k_t.detach(), mask, is_causal, scale, softcap)
    mask_student = mask if mask_student is None else mask_student
    log_s = probabilities(q_s, k_s, mask_student, is_causal, scale, softcap)
    seen = log_t > -torch.inf
    difference = torch.where(seen, log_t, 0) - torch.where(seen, log_s, 0)
    return (torch.where(seen, log_t, -torch.inf).exp() * difference).sum(-1)


def inputs(
    batch=2, heads=4, key_heads=4, queries=11, keys=11, dim=8, student_dim=None, dtype=torch.float32, seed=0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, tokens: int, dim: int) -> Tensor:
        # transposed, as attention gets them from (batch, tokens, heads, head_dim)
        return torch.randn(batch, tokens, heads, dim, generator=generator, dtype=dtype).transpose(1, 2)

    student_dim = student_dim or dim
    teacher = draw(heads, queries, dim), draw(key_heads, keys, dim)
    student = draw(heads, queries, student_dim), draw(key_heads, keys, student_dim)
    return *teacher, *(tensor.requires_grad_() for tensor in student)


def padding(keys: int = 11, batch: int = 2, *, left: bool = False) -> Tensor:
    """(batch, 1, 1, keys): the second text has three tokens less."""
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    mask[1, ..., slice(0, 3) if left else slice(keys - 3, keys)] = False
    return mask


def additive(mask: Tensor, hidden: float = -torch.inf) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


def assert_like_reference(tensors, *args, method="tiles", mask_student=None, **kwargs) -> None:
    """Value of every row, and gradient of a randomly weighted sum, of every student's tensor."""
    got = attention_kl(*tensors, *args, method=method, attention_mask_student=mask_student, **kwargs)
    expected = reference_kl(*tensors, *args, mask_student=mask_student, **kwargs)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)
    weight = torch.rand(got.shape, generator=torch.Generator().manual_seed(1))
    learned = [tensor for tensor in (*tensors, mask_student) if tensor is not None and tensor.requires_grad]
    slopes = torch.autograd.grad((got * weight).sum(), learned)
    for slope, wanted in zip(slopes, torch.autograd.grad((expected * weight).sum(), learned), strict=True):
        torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles even for tiny inputs: a few rows each, of one head of one text."""
    monkeypatch.setattr(attention_tiles, "_LEAST_ROWS", 4)
    monkeypatch.setattr(attention_tiles, "_CPU_TILE_ELEMENTS", 128)


@BOTH_METHODS
class TestAgreesWithLogSoftmax:
    def test_without_a_mask(self, method):
        assert_like_reference(inputs(), method=method)

    @pytest.mark.parametrize("left", [False, True])
    def test_with_a_boolean_padding_mask(self, method, left):
        assert_like_reference(inputs(), padding(left=left), method=method)

    @pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, -1e4])
    def test_with_an_additive_padding_mask(self, method, hidden):
        assert_like_reference(inputs(), additive(padding(), hidden), method=method)

    def test_with_a_mask_in_bfloat16(self, method):
        mask = additive(padding(), torch.finfo(torch.bfloat16).min).bfloat16()
        assert_like_reference(inputs(), mask, method=method)

    def test_with_a_bias_per_head_and_pair(self, method):
        bias = torch.randn(1, 4, 11, 11, generator=torch.Generator().manual_seed(3)) * 3
        assert_like_reference(inputs(), bias + additive(padding()), method=method)

    def test_with_a_mask_that_is_expanded_to_every_row(self, method):
        assert_like_reference(inputs(), padding().expand(2, 4, 11, 11), method=method)

    def test_with_a_mask_of_two_axes(self, method):
        assert_like_reference(inputs(), torch.ones(11, 11).tril(2).bool(), method=method)

    def test_causal(self, method):
        assert_like_reference(inputs(), is_causal=True, method=method)

    def test_causal_with_padding(self, method):
        assert_like_reference(inputs(), padding(), True, method=method)

    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize(("queries", "keys"), [(5, 13), (13, 5), (1, 9)])
    def test_across_lengths(self, method, queries, keys, is_causal):
        assert_like_reference(inputs(queries=queries, keys=keys), padding(keys), is_causal, method=method)

    @pytest.mark.parametrize("key_heads", [1, 2, 6])
    def test_with_grouped_queries(self, method, key_heads):
        assert_like_reference(inputs(heads=6, key_heads=key_heads), padding(), True, method=method)

    def test_with_grouped_queries_and_a_bias_per_head(self, method):
        bias = torch.randn(2, 6, 11, 11, generator=torch.Generator().manual_seed(3))
        assert_like_reference(inputs(heads=6, key_heads=2), bias, method=method)

    @pytest.mark.parametrize("dim", [1, 7, 20])
    def test_with_a_head_dim_that_is_no_power_of_two(self, method, dim):
        assert_like_reference(inputs(dim=dim), padding(), method=method)

    @pytest.mark.parametrize("student_dim", [3, 20])
    def test_with_a_student_of_another_head_dim(self, method, student_dim):
        assert_like_reference(inputs(student_dim=student_dim), padding(), method=method)

    def test_with_a_scale(self, method):
        assert_like_reference(inputs(), scale=0.7, method=method)

    def test_with_student_and_teacher_of_different_key_heads(self, method):
        q_t, k_t, _, _ = inputs(heads=4, key_heads=4)
        _, _, q_s, k_s = inputs(heads=4, key_heads=2, seed=1)
        assert_like_reference((q_t, k_t, q_s, k_s), padding(), method=method)

    def test_after_rotary_position_treatment(self, method):
        def rotary(tensor: Tensor) -> Tensor:
            half = tensor.shape[-1] // 2
            angle = torch.arange(tensor.shape[2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
            first, second = tensor.chunk(2, dim=-1)
            cos, sin = angle.cos(), angle.sin()
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        tensors = inputs()
        got = attention_kl(*map(rotary, tensors), padding(), True, method=method)
        expected = reference_kl(*map(rotary, tensors), padding(), True)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)
        for slope, wanted in zip(
            torch.autograd.grad(got.sum(), tensors[2:]), torch.autograd.grad(expected.sum(), tensors[2:]), strict=True
        ):
            torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-5)


@BOTH_METHODS
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradient_is_the_value_s_numerical_derivative(method, is_causal):
    q_t, k_t, q_s, k_s = inputs(batch=1, heads=2, key_heads=1, queries=4, keys=4, dim=3, dtype=torch.float64)
    mask = padding(4, 2)[1:]
    torch.autograd.gradcheck(lambda q, k: attention_kl(q_t, k_t, q, k, mask, is_causal, method=method), (q_s, k_s))


def test_numerical_derivative_with_softcap_and_student_mask():
    q_t, k_t, q_s, k_s = inputs(batch=2, heads=2, key_heads=1, queries=3, keys=4, dim=3, dtype=torch.float64)
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(
        lambda q, k, b: attention_kl(q_t, k_t, q, k, attention_mask_student=b, softcap=0.8), (q_s, k_s, bias)
    )


@pytest.mark.usefixtures("small_tiles")
class TestManyTiles:
    """A tile is a few rows of one head of one text; the sum over them is the whole."""

    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("key_heads", [1, 2, 4])
    def test_agree_with_log_softmax(self, key_heads, is_causal):
        bias = torch.randn(2, 4, 37, 37, generator=torch.Generator().manual_seed(3))
        assert_like_reference(inputs(key_heads=key_heads, queries=37, keys=37), bias, is_causal)

    def test_add_up_the_gradient_of_a_student_s_mask(self):
        bias = torch.randn(1, 4, 37, 37, generator=torch.Generator().manual_seed(3)).requires_grad_()
        assert_like_reference(inputs(key_heads=2, queries=37, keys=37), mask_student=bias)

    @pytest.mark.parametrize(("queries", "keys"), [(5, 23), (23, 5)])
    def test_agree_across_lengths_when_causal(self, queries, keys):
        assert_like_reference(inputs(queries=queries, keys=keys), padding(keys), True)


@pytest.mark.parametrize("tokens", [513, 700])
def test_tiles_of_their_usual_size_agree_with_log_softmax(tokens):
    assert_like_reference(inputs(heads=2, key_heads=1, queries=tokens, keys=tokens), padding(tokens), True)


def test_softcap_agrees_with_log_softmax():
    assert_like_reference(inputs(heads=4, key_heads=2), padding(), softcap=0.5)


@pytest.mark.parametrize("shape", [(1, 4, 11, 11), (2, 4, 11, 11), (1, 1, 1, 11), (2, 1, 11, 1), (4, 1, 11), (11,)])
def test_a_student_s_own_mask_gets_its_gradient(shape):
    generator = torch.Generator().manual_seed(5)
    teacher_bias = torch.randn(1, 4, 11, 11, generator=generator) + additive(padding())
    bias = torch.randn(shape, generator=generator).requires_grad_()
    tensors = inputs(key_heads=2)
    got = attention_kl(*tensors, teacher_bias, attention_mask_student=bias + additive(padding()))
    expected = reference_kl(*tensors, teacher_bias, mask_student=bias + additive(padding()))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)
    (slope,) = torch.autograd.grad(got.sum(), bias)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), bias)[0], rtol=1e-4, atol=1e-5)


def test_a_teacher_s_mask_gets_no_gradient():
    bias = torch.zeros(1, 1, 11, 11, requires_grad=True)
    attention_kl(*inputs(), bias).sum().backward()
    assert bias.grad is None


@BOTH_METHODS
@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("as_bool", [False, True])
class TestQueriesThatSeeNothing:
    def test_have_no_divergence_and_no_gradient(self, method, hidden, as_bool):
        mask = torch.ones(2, 1, 11, 11, dtype=torch.bool)
        mask[0, 0, 4] = False
        tensors = inputs()
        kl = attention_kl(*tensors, mask if as_bool else additive(mask, hidden), method=method)
        assert (kl[0, :, 4] == 0).all()
        query_slope, key_slope = torch.autograd.grad(kl.sum(), tensors[2:])
        assert (query_slope[0, :, 4] == 0).all()
        assert key_slope.isfinite().all()

    def test_leave_the_others_as_they_are(self, method, hidden, as_bool):
        mask = padding(left=True)  # the second text's first queries see padding only, once causal
        tensors = inputs()
        kl = attention_kl(*tensors, mask if as_bool else additive(mask, hidden), True, method=method)
        expected = reference_kl(*tensors, mask, True)
        seen = torch.ones_like(kl, dtype=torch.bool)
        seen[1, :, :3] = False
        torch.testing.assert_close(kl.double()[seen], expected[seen], rtol=1e-5, atol=2e-6)
        slopes = torch.autograd.grad(kl.sum(), tensors[2:])
        alone = [tensor[1:, :, 3:] for tensor in tensors]  # the second text without its padding
        wanted = torch.autograd.grad(reference_kl(*alone, is_causal=True).sum(), tensors[2:])
        for slope, want in zip(slopes, wanted, strict=True):
            torch.testing.assert_close(slope[1], want[1], rtol=1e-4, atol=1e-5)


@BOTH_METHODS
def test_rows_left_out_add_no_nan_whatever_their_bias(method):
    tensors = inputs()
    bias = torch.full((1, 1, 11, 11), 200.0)  # exp(200) is beyond float32
    rows = torch.arange(11) < 6
    slopes = torch.autograd.grad(attention_kl(*tensors, bias, method=method)[..., rows].sum(), tensors[2:])
    expected = torch.autograd.grad(reference_kl(*tensors, bias)[..., rows].sum(), tensors[2:])
    for slope, wanted in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, wanted, rtol=1e-3, atol=1e-4)


@BOTH_METHODS
def test_small_divergences_keep_their_digits(method):
    q_t, k_t, _, _ = inputs(dim=64, queries=64, keys=64)
    noise = inputs(dim=64, queries=64, keys=64, seed=1)[2:]
    q_s, k_s = q_t + 1e-3 * noise[0], k_t + 1e-3 * noise[1]
    got, expected = attention_kl(q_t, k_t, q_s, k_s, method=method), reference_kl(q_t, k_t, q_s, k_s)
    # tiles subtract log-probabilities entry by entry; the kernel's way cancels numbers of the scores' size
    torch.testing.assert_close(got.mean().double(), expected.mean(), rtol=0, atol=2e-8 if method == "tiles" else 2e-6)


def test_a_diverged_student_is_not_hidden():
    q_t, k_t, q_s, k_s = inputs()
    with torch.no_grad():
        q_s[0, 0, 0] = torch.nan
    assert attention_kl(q_t, k_t, q_s, k_s, padding())[0, 0, 0].isnan()


@BOTH_METHODS
def test_a_frozen_side_gets_no_gradient(method):
    q_t, k_t, q_s, k_s = inputs()
    attention_kl(q_t, k_t, q_s, k_s.detach(), method=method).sum().backward()
    expected = q_s.grad
    q_s.grad = None
    attention_kl(q_t, k_t, q_s, k_s, method=method).sum().backward()
    torch.testing.assert_close(expected, q_s.grad)
    both, k_s.grad = k_s.grad, None
    attention_kl(q_t, k_t, q_s.detach(), k_s, method=method).sum().backward()
    torch.testing.assert_close(both, k_s.grad)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@BOTH_METHODS
@pytest.mark.parametrize("is_causal", [False, True])
def test_no_attention_matrix_is_made(method, is_causal):
    tokens = 2048
    tensors = inputs(batch=1, heads=2, key_heads=1, queries=tokens, keys=tokens, dim=16)
    with LargestTensor() as largest:
        attention_kl(*tensors, padding(tokens)[1:], is_causal, method=method).sum().backward()
    assert 0 < largest.elements <= tokens * tokens / 2


@pytest.mark.parametrize(
    ("settings", "reason"), [({"softcap": 2.0}, "softcap"), ({"attention_mask_student": torch.zeros(11)}, "own mask")]
)
def test_a_kernel_that_cannot_is_replaced_by_tiles_and_said_once(settings, reason, caplog):
    attention._log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        first = attention_kl(*inputs(), method="kernel", **settings)
        attention_kl(*inputs(), method="kernel", **settings)
    assert [reason in record.message for record in caplog.records] == [True]
    torch.testing.assert_close(first, attention_kl(*inputs(), **settings))


def test_heads_that_key_heads_do_not_divide_are_refused():
    q_t, k_t, q_s, k_s = inputs(heads=4, key_heads=3)
    with pytest.raises(ValueError, match="3 key heads do not divide 4"):
        attention_kl(q_t, k_t, q_s, k_s)


@pytest.mark.parametrize("shape", [(2, 1, 1, 10), (3, 1, 1, 11), (1, 2, 11, 11), (1, 2, 1, 1, 11)])
def test_a_mask_that_does_not_broadcast_is_refused(shape):
    with pytest.raises(ValueError, match="does not broadcast"):
        attention_kl(*inputs(), torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("value_dim", [3, 8, 19])
class TestKernels:
    def test_attend_gives_the_weighted_values_and_the_log_sum_exp(self, key_heads, value_dim):
        query, key, _, _ = inputs(key_heads=key_heads)
        value = torch.randn(2, key_heads, 11, value_dim)
        output, logsumexp = attend(query, key, value, additive(padding()), False, 0.3)
        p = probabilities(query, key, padding(), scale=0.3).exp()
        expected = p @ value.double().repeat_interleave(4 // key_heads, dim=1)
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
        scores = query.double() @ key.double().repeat_interleave(4 // key_heads, dim=1).mT * 0.3
        lse = (scores + additive(padding())).logsumexp(-1)
        torch.testing.assert_close(logsumexp.double(), lse, rtol=1e-5, atol=1e-6)

    def test_transpose_attend_gathers_rows_by_key(self, key_heads, value_dim):
        query, key, _, _ = inputs(key_heads=key_heads)
        _, logsumexp = attend(query, key, key, additive(padding()), True, 0.3)
        rows = torch.randn(2, 4, 11, value_dim)
        gathered = transpose_attend(rows, query, key, logsumexp, additive(padding()), True, 0.3)
        p = probabilities(query, key, padding(), True, 0.3).exp()
        expected = (p.mT @ rows.double()).unflatten(1, (key_heads, -1)).sum(2)
        torch.testing.assert_close(gathered.double(), expected, rtol=1e-5, atol=1e-5)
