"""The logits aspect of station 5 for predictions that were kept: the teacher's likeliest tokens, and the rest as one.

Joining tokens cannot raise a divergence of this family, so every one of them bounds the one of whole vocabularies from
below, and equals it where all tokens are kept. Source: the data processing inequality (Cover & Thomas, Elements of
Information Theory, 2.8).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from makd.aspects.divergences import LEAST_LOG_PROBABILITY, Divergence


@dataclass(frozen=True)
class KeptPredictions:
    """A teacher's predictions, as far as they were kept. Rows that count for no loss may hold anything finite."""

    vocabulary: int
    """Tokens that the teacher's logits are of."""
    tokens: Int[Tensor, "*rows k"]
    """The likeliest tokens, the first one first."""
    log_probabilities: Float[Tensor, "*rows k"]
    """Theirs, at temperature 1."""
    log_missing: Mapping[float, Float[Tensor, "*rows"]]
    """Temperature -> logarithm of the probability that all other tokens have together."""

    def flatten(self) -> "KeptPredictions":
        """These predictions with all axes of rows joined into one."""
        missing = {temperature: mass.flatten() for temperature, mass in self.log_missing.items()}
        return KeptPredictions(
            self.vocabulary, self.tokens.flatten(0, -2), self.log_probabilities.flatten(0, -2), missing
        )

    def take(self, rows: slice | Tensor) -> "KeptPredictions":
        """Some of the rows."""
        missing = {temperature: mass[rows] for temperature, mass in self.log_missing.items()}
        return KeptPredictions(self.vocabulary, self.tokens[rows], self.log_probabilities[rows], missing)

    def joined(self, temperature: float, k: int) -> Float[Tensor, "rows outcomes"]:
        """Log-probabilities of the first `k` tokens, and of everything else as one outcome, which comes last.

        What was rounded in keeping it is made to add up to 1 again.
        """
        missing = self.log_missing[temperature]
        # log(1 - missing) is what the kept tokens have together; expm1 keeps its digits where missing is near 1
        together = (-torch.expm1(missing)).log().clamp_min(LEAST_LOG_PROBABILITY)
        kept = (self.log_probabilities.to(missing.dtype) / temperature).log_softmax(-1) + together[..., None]
        rest = missing[..., None]
        if k < kept.shape[-1]:
            rest = torch.logaddexp(kept[..., k:].logsumexp(-1, keepdim=True), rest)
        return torch.cat([kept[..., :k], rest], -1).clamp_min(LEAST_LOG_PROBABILITY)


def keep_predictions(
    logits: Float[Tensor, "rows vocabulary"], k: int, temperatures: tuple[float, ...]
) -> KeptPredictions:
    """The `k` likeliest tokens of each row (all of a smaller vocabulary), in float32."""
    log_p = logits.float().log_softmax(-1).clamp_min(LEAST_LOG_PROBABILITY)
    top, tokens = log_p.topk(min(k, log_p.shape[-1]))
    others = log_p.scatter(-1, tokens, LEAST_LOG_PROBABILITY)
    missing = {
        temperature: (others / temperature).logsumexp(-1) - (log_p / temperature).logsumexp(-1)
        for temperature in temperatures
    }
    return KeptPredictions(logits.shape[-1], tokens, top, missing)


def kept_divergence(
    student: Float[Tensor, "rows vocabulary"],
    tokens: Int[Tensor, "rows k"],
    teacher: Float[Tensor, "rows outcomes"],
    divergence: Divergence,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocabulary"]]:
    """A divergence after all tokens but some are joined into one, and its gradient.

    Args:
        student: log-probabilities.
        tokens: those that stay apart.
        teacher: log-probabilities of the tokens, then of everything else together: `KeptPredictions.joined`.
        divergence: one of `DIVERGENCES`.

    Returns:
        Value of each row, and its gradient with respect to the student's logits. A token of the rest has its share of
        the rest's gradient: ∂ log Σ exp(z) / ∂z_j is its probability within the rest.
    """
    q = student.exp()
    apart = student.gather(-1, tokens)
    q.scatter_(-1, tokens, 0)
    rest = q.sum(-1, keepdim=True)
    values, slope = divergence(torch.cat([apart, rest.log().clamp_min(LEAST_LOG_PROBABILITY)], -1), teacher)
    q *= slope[:, -1:] / rest.clamp_min(torch.finfo(rest.dtype).tiny)
    return values, q.scatter_(-1, tokens, slope[:, :-1])
