"""Station 5: what the student mimics. Losses are pure functions of tensors; they know no model and no trainer."""

from makd.aspects.attention import attention_kl
from makd.aspects.embedding import Pooling, embedding_distance, pool, similarity_mse
from makd.aspects.hidden import hidden_mse, normalised_mse
from makd.aspects.logits import logits_kl, regression_mse
from makd.aspects.matrix import matrix_mse
from makd.aspects.plan import ASPECTS, PRESETS, ActivePlan, ActiveTerm, Plan, Term, activate

__all__ = [
    "ASPECTS",
    "PRESETS",
    "ActivePlan",
    "ActiveTerm",
    "Plan",
    "Pooling",
    "Term",
    "activate",
    "attention_kl",
    "embedding_distance",
    "hidden_mse",
    "logits_kl",
    "matrix_mse",
    "normalised_mse",
    "pool",
    "regression_mse",
    "similarity_mse",
]
