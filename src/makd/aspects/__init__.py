"""Station 5: what the student mimics. Losses are pure functions of tensors; they know no model and no trainer."""

from makd.aspects.active_plan import ActivePlan, ActiveTerm, Comparison, activate
from makd.aspects.attention import attention_kl
from makd.aspects.attention_mean import attention_loss
from makd.aspects.completions import Completions
from makd.aspects.divergences import DIVERGENCES, Divergence, divergence, forward_kl
from makd.aspects.embedding import (
    PooledTexts,
    embedding_distance,
    similarity_mse,
    vector_distance,
)
from makd.aspects.hidden import cosine_distance, normalised_mse, variance_sums, variance_unit
from makd.aspects.kept import KeptPredictions, keep_predictions, kept_divergence
from makd.aspects.layers import spread_layers
from makd.aspects.logits import label_divergence, logits_divergence, regression_mse
from makd.aspects.own import own_loss
from makd.aspects.plan import PRESETS, Plan, Preset, Term
from makd.aspects.relation import relation_kl
from makd.aspects.table import ASPECTS, INSIDE, OF_HEAD, Aspect, Loss, Place
from makd.aspects.vocabulary import PredictionLosses, SoftLoss, chunked_logits_loss, next_labels
from makd.sentence_encoder import pool

__all__ = [
    "ASPECTS",
    "DIVERGENCES",
    "INSIDE",
    "OF_HEAD",
    "PRESETS",
    "ActivePlan",
    "ActiveTerm",
    "Aspect",
    "Comparison",
    "Completions",
    "Divergence",
    "KeptPredictions",
    "Loss",
    "Place",
    "Plan",
    "PooledTexts",
    "PredictionLosses",
    "Preset",
    "SoftLoss",
    "Term",
    "activate",
    "attention_kl",
    "attention_loss",
    "chunked_logits_loss",
    "cosine_distance",
    "divergence",
    "embedding_distance",
    "forward_kl",
    "keep_predictions",
    "kept_divergence",
    "label_divergence",
    "logits_divergence",
    "next_labels",
    "normalised_mse",
    "own_loss",
    "pool",
    "regression_mse",
    "relation_kl",
    "similarity_mse",
    "spread_layers",
    "variance_sums",
    "variance_unit",
    "vector_distance",
]
