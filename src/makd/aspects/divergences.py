"""How far the student's predictions are from the teacher's: one pure function a divergence, with its gradient.

All take the log-probabilities of both sides, a chunk of rows at a time, and return each row's value in nats (shares of
probability for `total_variation`) and that value's gradient with respect to the student's logits. p is the teacher's
distribution and q the student's. Softmax turns ∂D/∂q into ∂D/∂z_j = q_j (∂D/∂q_j - Σ_i q_i ∂D/∂q_i).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from makd.registry import Registry

LEAST_LOG_PROBABILITY = -1e30
"""Stands for minus infinity (a token that is ruled out), so that 0 · (this - this) is 0 and not NaN."""

LogProbabilities: TypeAlias = Float[Tensor, "rows vocabulary"]
ValueAndSlope: TypeAlias = tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocabulary"]]
Divergence: TypeAlias = Callable[[LogProbabilities, LogProbabilities], ValueAndSlope]
"""(student, teacher) -> (value of each row, its gradient with respect to the student's logits)."""


def log_probabilities(logits: LogProbabilities, temperature: float, dtype: torch.dtype) -> LogProbabilities:
    """The logarithm of softmax(logits / temperature) in `dtype`; minus infinity becomes `LEAST_LOG_PROBABILITY`."""
    scaled = logits.to(dtype) if temperature == 1 else logits.to(dtype) / temperature
    return scaled.log_softmax(-1).clamp_min_(LEAST_LOG_PROBABILITY)


def forward_kl(student: LogProbabilities, teacher: LogProbabilities) -> ValueAndSlope:
    """KL(p ‖ q): the student covers all that the teacher may say. Source: Hinton, Vinyals & Dean, arXiv 1503.02531."""
    p = teacher.exp()
    return torch.linalg.vecdot(p, teacher - student), student.exp() - p


def reverse_kl(student: LogProbabilities, teacher: LogProbabilities) -> ValueAndSlope:
    """KL(q ‖ p): the student says nothing that the teacher would not. Source: MiniLLM, arXiv 2306.08543."""
    q = student.exp()
    return _from_student(q, student - teacher)


def jsd(student: LogProbabilities, teacher: LogProbabilities, beta: float = 0.5) -> ValueAndSlope:
    """Generalised Jensen-Shannon: beta KL(p ‖ m) + (1 - beta) KL(q ‖ m), m = beta p + (1 - beta) q.

    Divided by beta it tends to the forward KL for beta → 0, and divided by 1 - beta to the reverse one for beta → 1.
    ∂/∂q = (1 - beta) log(q / m). Source: GKD, arXiv 2306.13649, section 2.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    p, q = teacher.exp(), student.exp()
    value, slope = _from_student(q, student - mixture)
    return beta * torch.linalg.vecdot(p, teacher - mixture) + (1 - beta) * value, (1 - beta) * slope


def skew_forward_kl(student: LogProbabilities, teacher: LogProbabilities, alpha: float = 0.1) -> ValueAndSlope:
    """KL(p ‖ m), m = alpha p + (1 - alpha) q: never infinite, and its gradient is small where q is.

    ∂/∂q = -(1 - alpha) p / m. Source: DistiLLM, arXiv 2402.03898.
    """
    if alpha == 0:
        return forward_kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(alpha), student + math.log1p(-alpha))
    p, q = teacher.exp(), student.exp()
    pull = (1 - alpha) * (teacher - mixture).exp()  # at most (1 - alpha) / alpha
    return torch.linalg.vecdot(p, teacher - mixture), q * (torch.linalg.vecdot(q, pull)[:, None] - pull)


def skew_reverse_kl(student: LogProbabilities, teacher: LogProbabilities, alpha: float = 0.1) -> ValueAndSlope:
    """KL(q ‖ m), m = (1 - alpha) p + alpha q. Source: DistiLLM, arXiv 2402.03898.

    ∂/∂q = log(q / m) + 1 - alpha q / m.
    """
    if alpha == 0:
        return reverse_kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log1p(-alpha), student + math.log(alpha))
    q, difference = student.exp(), student - mixture
    push = difference - alpha * difference.exp()
    return torch.linalg.vecdot(q, difference), q * (push - torch.linalg.vecdot(q, push)[:, None])


def total_variation(student: LogProbabilities, teacher: LogProbabilities) -> ValueAndSlope:
    """½ Σ |p - q|, in [0, 1]; it has a kink at p = q, where the gradient is taken as 0. Source: arXiv 2307.15190."""
    q = student.exp()
    difference = q - teacher.exp()
    half = 0.5 * difference.sign()
    return 0.5 * difference.abs().sum(-1), q * (half - torch.linalg.vecdot(q, half)[:, None])


def top_k(student: LogProbabilities, teacher: LogProbabilities, k: int = 64) -> ValueAndSlope:
    """KL(p ‖ q) after all but the teacher's k likeliest tokens are joined into one, which has their missing mass.

    Joining cannot raise a KL, so it bounds `forward_kl` from below, and equals it for k = V. What the teacher has to
    hand over is k numbers a token. Without the missing mass the student would be taught that the rest is impossible.
    Source: the data processing inequality (Cover & Thomas, Elements of Information Theory, 2.8).
    """
    top, tokens = teacher.topk(min(k, teacher.shape[-1]))
    rest_p = teacher.scatter(-1, tokens, LEAST_LOG_PROBABILITY).logsumexp(-1)
    rest_q = student.scatter(-1, tokens, LEAST_LOG_PROBABILITY).logsumexp(-1)
    p_top = top.exp()
    value = torch.linalg.vecdot(p_top, top - student.gather(-1, tokens)) + rest_p.exp() * (rest_p - rest_q)
    # what each token is to have: the teacher's p in the top, and in the rest its share of the teacher's rest
    wanted = (student + (rest_p - rest_q)[:, None]).exp().scatter(-1, tokens, p_top)
    return value, student.exp() - wanted


@dataclass(frozen=True)
class DivergenceKind:
    """A divergence, and what may be set about it."""

    function: Callable[..., ValueAndSlope]
    summary: str
    setting: str | None = None
    """Name of its setting, a keyword of `function`."""
    allowed: str = ""
    """Which values `setting` may have, in words."""


DIVERGENCES: Registry[DivergenceKind] = Registry(
    "divergence",
    {
        "forward_kl": DivergenceKind(forward_kl, "KL(p ‖ q)"),
        "reverse_kl": DivergenceKind(reverse_kl, "KL(q ‖ p)"),
        "jsd": DivergenceKind(
            jsd, "beta KL(p ‖ m) + (1 - beta) KL(q ‖ m), m = beta p + (1 - beta) q", "beta", "in (0, 1)"
        ),
        "skew_forward_kl": DivergenceKind(skew_forward_kl, "KL(p ‖ alpha p + (1 - alpha) q)", "alpha", "in [0, 1)"),
        "skew_reverse_kl": DivergenceKind(skew_reverse_kl, "KL(q ‖ (1 - alpha) p + alpha q)", "alpha", "in [0, 1)"),
        "total_variation": DivergenceKind(total_variation, "½ Σ |p - q|"),
        "top_k": DivergenceKind(top_k, "KL of the teacher's k likeliest tokens and the rest as one", "k", "at least 1"),
    },
)
"""How predictions may be compared; p is the teacher's distribution, q the student's."""

_IN_RANGE: dict[str, Callable[[float], bool]] = {
    "beta": lambda value: 0 < value < 1,
    "alpha": lambda value: 0 <= value < 1,
    "k": lambda value: value >= 1,
}


def divergence(name: str, **settings: float | int) -> Divergence:
    """The divergence called `name` with those of `settings` (beta, alpha, k) that it has.

    Raises:
        UnknownNameError: no divergence is called so.
        ValueError: a setting that it has is out of its range.
    """
    kind = DIVERGENCES[name]
    if kind.setting is None or kind.setting not in settings:
        return kind.function
    value = settings[kind.setting]
    if not _IN_RANGE[kind.setting](value):
        raise ValueError(f"{kind.setting} of {name} is {kind.allowed}; got {value}.")
    return partial(kind.function, **{kind.setting: value})


def _from_student(q: Tensor, difference: Tensor) -> ValueAndSlope:
    """Σ q · difference and its gradient, where ∂/∂q is `difference` and a constant."""
    value = torch.linalg.vecdot(q, difference)
    return value, q * (difference - value[:, None])
