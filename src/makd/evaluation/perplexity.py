"""Station 8: perplexity of a language model."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from makd.anatomy.batches import check_batches, model_inputs
from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.tokens import IGNORE_INDEX
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
    costs = TokenCosts(model)
    with in_eval(model):
        for batch in check_batches(batches, model):
            with without_cache(model):
                costs.add(model(**model_inputs(batch, model.device)), batch)
    return costs.perplexity()


class TokenCosts:
    """What a model's predictions of the true tokens cost it, in nats, summed over batches."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._total, self._count = 0.0, 0

    def add(self, output: ModelOutput, batch: Mapping[str, Tensor]) -> None:
        """Count the tokens of a batch, from the model's output for it.

        Raises:
            DataError: the model is an encoder-decoder, and the batch has no responses.
            NumericsError: the predictions hold NaN or infinity.
        """
        logits: Tensor = output["logits"]
        if self._model.config.is_encoder_decoder:
            targets = _responses(batch).to(logits.device)
            real = targets != IGNORE_INDEX
        else:
            tokens = batch["input_ids"].to(logits.device)
            mask = batch.get("attention_mask", torch.ones_like(tokens)).to(logits.device).bool()
            logits, targets, real = logits[:, :-1], tokens[:, 1:], mask[:, 1:] & mask[:, :-1]
            if "labels" in batch:
                real &= batch["labels"][:, 1:].to(logits.device) != IGNORE_INDEX
        for scores, wanted, keep in zip(logits, targets, real, strict=True):  # a row at a time: a vocabulary is wide
            check_outputs(scores[keep], f"The predictions of the {type(self._model).__name__}")
            self._total += float(cross_entropy(scores[keep].float(), wanted[keep], reduction="sum"))
        self._count += int(real.sum())

    def perplexity(self) -> float:
        """Exp of the mean.

        Raises:
            DataError: no token was counted.
            NumericsError: the perplexity is infinite.
        """
        if self._count == 0:
            raise DataError("Perplexity needs rows of at least two tokens; there are none.")
        try:
            return math.exp(self._total / self._count)
        except OverflowError as error:
            raise NumericsError(
                f"The perplexity of the {type(self._model).__name__} is infinite: a token costs it "
                f"{self._total / self._count:,.0f} nats. Its weights are broken, or it was made too small."
            ) from error


def _responses(batch: Mapping[str, Tensor]) -> Tensor:
    if "labels" not in batch:
        raise DataError(
            "The perplexity of an encoder-decoder is that of responses to prompts, and a batch has no labels. Give "
            "rows of prompts with responses."
        )
    return batch["labels"]
