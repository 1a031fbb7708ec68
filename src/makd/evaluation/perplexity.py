"""Station 8: perplexity of a causal language model."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from makd.anatomy.batches import check_batches
from makd.errors import DataError
from makd.kinds import takes


@takes
@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Exp of the mean negative log-likelihood of a token given those before it in its row, over all real tokens.

    Every token but the first of a row counts once, whatever the batch it stands in.

    Raises:
        DataError: no row has two tokens.
    """
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    for batch in check_batches(batches, model):
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask") if name in batch}
        logits = model(**inputs).logits[:, :-1]
        targets = inputs["input_ids"][:, 1:]
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        real = mask[:, 1:] & mask[:, :-1]
        for scores, wanted, keep in zip(logits, targets, real, strict=True):  # a row at a time: a vocabulary is wide
            total += float(cross_entropy(scores[keep].float(), wanted[keep], reduction="sum"))
        count += int(real.sum())
    model.train(was_training)
    if count == 0:
        raise DataError("Perplexity needs rows of at least two tokens; there are none.")
    return math.exp(total / count)
