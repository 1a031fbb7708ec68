"""The logits aspect of station 5 for vocabularies: losses from last hidden states and heads, without the logits.

With V = 151 936 the logits of 4096 tokens are 2.5 GB in float32, of teacher, student and gradient each: the largest
tensors of a step. Here they exist for a chunk of tokens at a time, and what the backward needs of them, the gradients
of hidden states and head, is added up in the same pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from makd.anatomy.tokens import IGNORE_INDEX
from makd.aspects.divergences import Divergence, forward_kl, log_probabilities
from makd.aspects.kept import KeptPredictions, kept_divergence
from makd.aspects.logits import common_vocabulary
from makd.capture import VocabularyHead

_CHUNK_BYTES = 3 * 2**25
"""Logits of each model that exist at a time: 100 MB, of a vocabulary of 152 000 in float32 those of 165 tokens. The
gradient of the head's weight is read and written once a chunk, so small chunks would wait for memory."""
_PIECE_ELEMENTS = 2**21
"""Logits whose softmax is taken at a time: 8 MB, as in `logits`."""
_BLOCK_ELEMENTS = 2**22
"""Weights whose gradient is added at a time where it has to be widened first: an operand that stays in the cache."""


@dataclass(frozen=True, kw_only=True)
class SoftLoss:
    """One comparison of predictions. Its value is multiplied by the temperature's square."""

    divergence: Divergence = forward_kl
    temperature: float = 1.0
    weight: float = 1.0
    """Its factor in the total."""
    k: int | None = None
    """Of kept predictions, how many tokens are told apart; None takes all that were kept."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"A temperature is above 0; got {self.temperature}.")


@dataclass(frozen=True)
class PredictionLosses:
    """What `chunked_logits_loss` finds."""

    total: Float[Tensor, ""]
    """Weighted sum of the others. Only it carries a gradient: separate ones would need a pass each."""
    soft: tuple[Float[Tensor, ""], ...]
    """One for each `SoftLoss`, unweighted."""
    hard: Float[Tensor, ""] | None
    """Cross-entropy of the labels in nats, unweighted; None without labels."""


def chunked_logits_loss(
    hidden_student: Float[Tensor, "*rows student_inp"],
    head_student: VocabularyHead,
    hidden_teacher: Float[Tensor, "*rows teacher_inp"] | None = None,
    head_teacher: VocabularyHead | None = None,
    mask: Bool[Tensor, "*rows"] | None = None,
    soft: Sequence[SoftLoss] = (SoftLoss(),),
    labels: Int[Tensor, "*rows"] | None = None,
    hard_weight: float = 1.0,
    kept_teacher: KeptPredictions | None = None,
) -> PredictionLosses:
    """Divergences from the teacher's predictions, and the hard loss of the labels, in one pass over chunks of tokens.

    Values and gradients are those of the whole logits. Under autocast the products with the heads are in its dtype, as
    the heads' own would be; after it, as in a `DistillTrainer` whose student's forward alone is under it, in that of
    the weights: more exact, near a teacher above all. Softmaxes are in float32 (float64 for float64).

    Args:
        hidden_student: what the student's head is handed; may hold anything in rows that count for no loss.
        head_student: a tied weight gets its gradient like any other.
        hidden_teacher: what the teacher's head is handed; not needed without `soft`. Gets no gradient.
        head_teacher: gets no gradient.
        mask: True at rows whose predictions are compared; None for all of them.
        soft: the comparisons. Each is a mean over the rows of `mask`, over the vocabulary that both heads have: one
            that is padded further is cut, and that is said once.
        labels: of each row's prediction, `IGNORE_INDEX` where there is none: `next_labels` for causal models. The hard
            loss is a mean over the labelled rows, over the student's whole vocabulary. With no label it is 0.
        hard_weight: factor of the hard loss in the total.
        kept_teacher: predictions of the rows that were kept, in the place of `hidden_teacher` and `head_teacher`.

    Raises:
        ValueError: there is something to compare, but no teacher; or kept predictions are of more tokens than the
            student's.
    """
    if kept_teacher is not None and kept_teacher.vocabulary > len(head_student.weight):
        raise ValueError(
            f"Predictions were kept of {kept_teacher.vocabulary} tokens; {len(head_student.weight)} exist."
        )
    if soft and kept_teacher is None and (hidden_teacher is None or head_teacher is None):
        raise ValueError("A comparison needs the teacher's hidden states and head; give them, or soft=().")
    teacher = None
    if soft and hidden_teacher is not None and head_teacher is not None:
        common_vocabulary(len(head_student.weight), len(head_teacher.weight))
        hidden = hidden_teacher.detach().flatten(0, -2).to(hidden_student.device)
        teacher = _Side(hidden, head_teacher, _product_dtype(hidden_teacher))
    kept = kept_teacher.flatten() if soft and kept_teacher is not None else None
    flat = hidden_student.flatten(0, -2)
    compared = torch.ones(len(flat), dtype=torch.bool, device=flat.device) if mask is None else mask.flatten()
    compared = compared if soft else torch.zeros_like(compared)
    targets = torch.full_like(compared, IGNORE_INDEX, dtype=torch.long) if labels is None else labels.flatten()
    job = _Job(head_student, _product_dtype(hidden_student), teacher, kept, tuple(soft), compared, targets, hard_weight)
    with torch.autocast(flat.device.type, enabled=False):
        total, parts = _ChunkedLosses.apply(flat, head_student.weight, head_student.bias, job)
    return PredictionLosses(total, tuple(parts[:-1]), None if labels is None else parts[-1])


def next_labels(labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Each token's label is that of the one after it, as a causal model predicts it; the last has `IGNORE_INDEX`."""
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


@dataclass(frozen=True)
class _Side:
    hidden: Tensor  # (rows, inp)
    head: VocabularyHead
    dtype: torch.dtype  # of the product with the head


@dataclass(frozen=True)
class _Job:
    head: VocabularyHead
    dtype: torch.dtype
    teacher: _Side | None
    kept: KeptPredictions | None  # in its place
    soft: tuple[SoftLoss, ...]
    compared: Tensor  # (rows,), bool
    targets: Tensor  # (rows,), IGNORE_INDEX where there is no label
    hard_weight: float


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    takes_part = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if takes_part else hidden.dtype


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, Tensor]:
        pass_ = _Pass(job, hidden, weight, bias, ctx.needs_input_grad[:3])
        rows = (job.compared | (job.targets != IGNORE_INDEX)).nonzero().squeeze(-1)
        pass_.taken = len(rows)
        step = max(1, _CHUNK_BYTES // (job.dtype.itemsize * len(weight)))
        pass_.make_room(min(step, len(rows)))
        for start in range(0, len(rows), step):
            last = min(start + step, len(rows))
            # rows that all count are taken without a copy
            pass_.take(slice(start, last) if len(rows) == len(hidden) else rows[start:last])
        parts = pass_.means()
        pass_.finish()
        ctx.mark_non_differentiable(parts)
        ctx.save_for_backward(pass_.hidden_slope, pass_.weight_slope, pass_.bias_slope)
        ctx.factor, ctx.dtypes = pass_.largest, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        weights = parts.new_tensor([*(loss.weight for loss in job.soft), job.hard_weight])
        return torch.dot(parts, weights), parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        factor = grad_total * ctx.factor
        hidden, weight, bias = (
            None if slope is None else torch.mul(slope, factor, out=torch.empty_like(slope, dtype=dtype))
            for slope, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return hidden, weight, bias, None


class _Pass:
    """Sums of losses and gradients over the chunks that were taken so far.

    Gradients lack the factor `largest`, which the backward adds together with the loss scaling: without it float16
    would round them to 0.
    """

    def __init__(
        self, job: _Job, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]
    ) -> None:
        self.job, self.hidden = job, hidden
        theirs = [] if job.teacher is None else [job.teacher.hidden.dtype, job.teacher.head.weight.dtype]
        self.wide = torch.float32
        for dtype in (hidden.dtype, weight.dtype, *theirs):
            self.wide = torch.promote_types(self.wide, dtype)
        # under autocast the weight is taken into its dtype once a pass
        self.weight = weight.to(job.dtype)
        self.bias = None if bias is None else bias.to(job.dtype)
        self.common = len(weight)
        if job.kept is not None:
            self.common = min(self.common, job.kept.vocabulary)
        if job.teacher is not None:
            self.common = min(self.common, len(job.teacher.head.weight))
            place, kept_in = hidden.device, job.teacher.dtype
            self.teacher_weight = job.teacher.head.weight.detach()[: self.common].to(place, kept_in)
            bias = job.teacher.head.bias
            self.teacher_bias = None if bias is None else bias.detach()[: self.common].to(place, kept_in)
        self.counts = [int(job.compared.sum())] * len(job.soft) + [int((job.targets != IGNORE_INDEX).sum())]
        factors = [loss.weight * loss.temperature / max(1, self.counts[0]) for loss in job.soft]
        factors.append(job.hard_weight / max(1, self.counts[-1]))
        self.largest = max(map(abs, factors)) or 1.0
        self.shares = [factor / self.largest for factor in factors]
        self.taken = len(hidden)
        self.sums = hidden.new_zeros(len(factors), dtype=self.wide)
        self.hidden_slope = torch.zeros_like(hidden) if needed[0] else None
        # added up over chunks: in float32 whatever the weight is kept in
        self.weight_slope = torch.zeros_like(weight, dtype=self.wide) if needed[1] else None
        self.kept_as = weight.dtype
        self.bias_slope = weight.new_zeros(len(weight), dtype=self.wide) if needed[2] else None

    def make_room(self, rows: int) -> None:
        """One buffer for the logits of all chunks: fresh memory for each would have to be mapped each time."""
        self.room = self.weight.new_empty(rows, len(self.weight))
        if self.job.teacher is not None:
            self.teacher_room = self.teacher_weight.new_empty(rows, self.common)

    def finish(self) -> None:
        """Free the buffers, and keep the weight's gradient in its dtype, where that cannot overflow without factor."""
        del self.room
        self.__dict__.pop("teacher_room", None)
        if self.weight_slope is not None and self.kept_as != torch.float16:
            self.weight_slope = self.weight_slope.to(self.kept_as)

    def means(self) -> Tensor:
        """Each loss, unweighted: the soft ones, then the hard one."""
        squares = [loss.temperature**2 for loss in self.job.soft] + [1.0]
        scale = [square / max(1, count) for square, count in zip(squares, self.counts, strict=True)]
        return self.sums * self.sums.new_tensor(scale)

    def take(self, rows: slice | Tensor) -> None:
        """Add the losses of some rows, and their gradients."""
        job = self.job
        inputs = self.hidden[rows].to(job.dtype)
        logits, theirs = _product(inputs, self.weight, self.bias, self.room), None
        compared, targets = job.compared[rows], job.targets[rows]
        kept = None if job.kept is None else job.kept.take(rows)
        if job.teacher is not None:
            hidden = job.teacher.hidden[rows].to(job.teacher.dtype)
            theirs = _product(hidden, self.teacher_weight, self.teacher_bias, self.teacher_room)
        step = max(1, _PIECE_ELEMENTS // logits.shape[-1])
        for start in range(0, len(logits), step):
            piece = slice(start, start + step)
            raw = logits[piece].to(self.wide)
            ours = job.head.finish(raw)
            told = kept.take(piece) if kept is not None else None if theirs is None else theirs[piece]
            slope = self._losses(ours, told, compared[piece], targets[piece])
            if job.head.softcap is not None:
                slope *= 1 - (ours / job.head.softcap).square()
            logits[piece] = slope if job.head.scale == 1 else slope * job.head.scale
        self._add_slopes(rows, inputs, logits)

    def _add_slopes(self, rows: slice | Tensor, inputs: Tensor, slope: Tensor) -> None:
        """`slope` is the gradient of the chunk's logits before scale and bound."""
        if self.hidden_slope is not None:
            self.hidden_slope[rows] = (slope @ self.weight).to(self.hidden_slope.dtype)
        if self.weight_slope is not None:
            if slope.dtype == self.weight_slope.dtype:
                self.weight_slope.addmm_(slope.T, inputs)
            else:
                block = max(1, _BLOCK_ELEMENTS // inputs.shape[-1])
                for start in range(0, len(self.weight), block):
                    part = slice(start, start + block)
                    self.weight_slope[part] += slope[:, part].T @ inputs
        if self.bias_slope is not None:
            self.bias_slope += slope.sum(0, dtype=self.wide)

    def _losses(
        self, ours: Tensor, theirs: Tensor | KeptPredictions | None, compared: Tensor, targets: Tensor
    ) -> Tensor:
        """Add the losses of a piece; returns the gradient of the student's logits."""
        student = _Softmaxes(ours[:, : self.common], self.wide)
        slopes: list[Tensor] = []
        if isinstance(theirs, KeptPredictions):
            for index, loss in enumerate(self.job.soft):
                values, slope = _compare_kept(loss, student.at(loss.temperature), theirs)
                slopes.append(self._count(index, values, slope, compared))
        elif theirs is not None and self.job.teacher is not None:
            teacher = _Softmaxes(self.job.teacher.head.finish(theirs.to(self.wide)), self.wide)
            for index, loss in enumerate(self.job.soft):
                values, slope = loss.divergence(student.at(loss.temperature), teacher.at(loss.temperature))
                slopes.append(self._count(index, values, slope, compared))
        if self.common < ours.shape[-1]:
            slopes = [torch.nn.functional.pad(slope, (0, ours.shape[-1] - self.common)) for slope in slopes]
            student = _Softmaxes(ours, self.wide)
        if self.counts[-1]:
            log_q, places = student.at(1.0), targets.clamp(min=0)[:, None]
            slope = log_q.exp().scatter_add_(-1, places, torch.full_like(places, -1, dtype=self.wide))
            slopes.append(self._count(-1, -log_q.gather(-1, places).squeeze(-1), slope, targets != IGNORE_INDEX))
        return slopes[0] if len(slopes) == 1 else torch.stack(slopes).sum(0)

    def _count(self, index: int, values: Tensor, slope: Tensor, counted: Tensor) -> Tensor:
        """Add the values of the rows that count, and give the others no gradient."""
        if self.counts[index] < self.taken:
            # where, not times: what does not count may be NaN
            values, slope = torch.where(counted, values, 0), torch.where(counted[:, None], slope, 0)
        self.sums[index] += values.sum()
        return slope if self.shares[index] == 1 else slope * self.shares[index]


def _compare_kept(loss: SoftLoss, student: Tensor, kept: KeptPredictions) -> tuple[Tensor, Tensor]:
    k = kept.tokens.shape[-1] if loss.k is None else min(loss.k, kept.tokens.shape[-1])
    joined = kept.joined(loss.temperature, k).to(student.dtype)
    return kept_divergence(student, kept.tokens[:, :k], joined, loss.divergence)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
    """What a linear gives, in the first rows of `room`."""
    room = room[: len(inputs)]
    return torch.mm(inputs, weight.T, out=room) if bias is None else torch.addmm(bias, inputs, weight.T, out=room)


class _Softmaxes:
    """Log-probabilities of some logits by temperature, each computed once."""

    def __init__(self, logits: Tensor, dtype: torch.dtype) -> None:
        self.logits, self.dtype = logits, dtype
        self.known: dict[float, Tensor] = {}

    def at(self, temperature: float) -> Tensor:
        if temperature not in self.known:
            self.known[temperature] = log_probabilities(self.logits, temperature, self.dtype)
        return self.known[temperature]
