"""Station 8: perplexity of a language model."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from makd.anatomy.batches import check_batches, model_inputs
from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.tokens import NO_LABEL
from makd.errors import DataError, NumericsError
from makd.kinds import takes
from makd.weights.finite import check_outputs


@takes
@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Exp of the mean negative log-likelihood of a token given those before it in its row, over all real tokens.

    Every token but the first of a row counts once, whatever the batch it stands in; not one that `labels` leave out, as
    the token that stands before every text. Of an encoder-decoder, every token of the responses, given the prompt too.

    Raises:
        DataError: no row has two tokens.
        NumericsError: the predictions hold NaN or infinity, or are so wrong that the perplexity is infinite.
    """
    total, count = 0.0, 0
    with in_eval(model):
        for batch in check_batches(batches, model):
            inputs = model_inputs(batch, model.device)
            with without_cache(model):
                logits = model(**inputs).logits
            if model.config.is_encoder_decoder:
                targets = _responses(batch).to(model.device)
                real = targets != NO_LABEL
            else:
                logits, targets = logits[:, :-1], inputs["input_ids"][:, 1:]
                mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
                real = mask[:, 1:] & mask[:, :-1]
                if "labels" in batch:
                    real &= batch["labels"][:, 1:].to(model.device) != NO_LABEL
            for scores, wanted, keep in zip(
                logits, targets, real, strict=True
            ):  # a row at a time: a vocabulary is wide
                check_outputs(scores[keep], f"The predictions of the {type(model).__name__}")
                total += float(cross_entropy(scores[keep].float(), wanted[keep], reduction="sum"))
            count += int(real.sum())
    if count == 0:
        raise DataError("Perplexity needs rows of at least two tokens; there are none.")
    try:
        return math.exp(total / count)
    except OverflowError as error:
        raise NumericsError(
            f"The perplexity of the {type(model).__name__} is infinite: a token costs it {total / count:,.0f} nats. "
            "Its weights are broken, or it was made too small."
        ) from error


def _responses(batch: Mapping[str, Tensor]) -> Tensor:
    if "labels" not in batch:
        raise DataError(
            "The perplexity of an encoder-decoder is that of responses to prompts, and a batch has no labels. Give "
            "rows of prompts with responses."
        )
    return batch["labels"]
