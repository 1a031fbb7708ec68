"""Station 3: how far a changed model's outputs are from the teacher's, where two students are to be told apart.

In the units that `gradients` measures linears in: KL of predictions, or squared distance of unit embeddings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, normalize
from transformers import PreTrainedModel

from makd.anatomy import Anatomy
from makd.anatomy.batches import model_inputs
from makd.anatomy.key_cache import without_cache
from makd.anatomy.tokens import encoder_tokens, layer_tokens

PROBE_TOKENS = 4096
"""Tokens of the calibration text that drift is measured on, about: every comparison costs a forward of them."""


def choose_probes(batches: Sequence[Mapping[str, Tensor]], tokens: int = PROBE_TOKENS) -> list[Mapping[str, Tensor]]:
    """About `tokens` tokens of the batches, and at least one batch; evenly, since they are often sorted by length."""
    total = sum(batch["input_ids"].numel() for batch in batches)
    wanted = max(1, min(len(batches), round(len(batches) * tokens / max(total, 1))))
    return [batches[index * len(batches) // wanted] for index in range(wanted)] if batches else []


@torch.no_grad()
def outputs_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Any:
    """One forward without labels and without a cache; `model` is in eval mode."""
    inputs = model_inputs(batch, model.device)
    with without_cache(model):
        return model(**inputs)


def distance(anatomy: Anatomy, batch: Mapping[str, Tensor], reference: Any, output: Any) -> tuple[float, int]:
    """Sum over the batch's predictions (tokens, texts, or labels that hold or not), and how many there are.

    A prediction's is KL(reference ‖ output) in nats; a regression's the squared difference; without a head a text's is
    the squared distance of mean-pooled unit embeddings, in [0, 4].
    """
    tokens = layer_tokens(anatomy, anatomy.layers[-1], batch).to(output[0].device)
    if anatomy.predictions is None:
        mask = tokens[..., None].to(output[0].dtype)
        theirs, ours = (normalize((side[0] * mask).sum(1) / mask.sum(1), dim=-1) for side in (reference, output))
    else:
        real = encoder_tokens(batch) if anatomy.predictions.target == "places" else tokens
        theirs, ours = (anatomy.predictions.rows(side, real) for side in (reference, output))
    if anatomy.predictions is None or anatomy.predictions.target == "numbers":
        return float((ours - theirs).float().square().sum()), len(ours)
    total = 0.0
    for mine, other in zip(ours.split(512), theirs.split(512), strict=True):  # a vocabulary is wide
        log_s, log_t = mine.float().log_softmax(-1), other.float().log_softmax(-1)
        total += float(kl_div(log_s, log_t, reduction="sum", log_target=True))
    return total, len(ours)


def drift(
    student: PreTrainedModel, teacher: PreTrainedModel, anatomy: Anatomy, batches: Sequence[Mapping[str, Tensor]]
) -> float:
    """Mean `distance` of the student's outputs from the teacher's over `batches`; both are in eval mode."""
    found = [distance(anatomy, batch, outputs_of(teacher, batch), outputs_of(student, batch)) for batch in batches]
    return sum(total for total, _ in found) / max(1, sum(count for _, count in found))
