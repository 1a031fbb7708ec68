"""Station 1: padding in batches that somebody else made: which side it is on, and whether it is marked at all."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from makd.errors import DataError

UNMARKED = 3
"""So many padding tokens at an end of a row are padding. Where it is the end-of-text token too, a text may end in one,
or in the two of a template and a tokenizer that each add theirs."""


def check_marked(batch: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Refuse tokens without a mask that begin or end with padding: they would be read, and counted, as text.

    What a decoder reads may begin with the padding token; and where there are labels, these say which tokens count.

    Args:
        batch: model inputs.
        model: whose config names the padding token; one that names none is not looked at.

    Raises:
        DataError: a row begins or ends with `UNMARKED` padding tokens or more.
    """
    padding = getattr(model.config, "pad_token_id", None)
    if not isinstance(padding, int):
        return
    for prefix in ("", "decoder_"):
        ids, known = batch.get(f"{prefix}input_ids"), f"{prefix}attention_mask" in batch
        if ids is None or known or (prefix and "labels" in batch) or ids.shape[1] < UNMARKED:
            continue
        ends = [ids[:, -UNMARKED:]] if prefix else [ids[:, :UNMARKED], ids[:, -UNMARKED:]]
        if any(bool((end == padding).all(dim=1).any()) for end in ends):
            raise DataError(
                f"{prefix}input_ids of a batch have a row that begins or ends with {UNMARKED} or more of the padding "
                f"token, {padding}, which would count as text: there is no {prefix}attention_mask. Give the one that "
                "the tokenizer gives; or, if this is text, one of ones."
            )


def padded_right(batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """`batch` with each row's padding behind its tokens, where some stood before them.

    Models count positions from the left edge, so one that has learned them reads a text behind padding otherwise than
    alone. Where `position_ids` are given, they say where each token is, and nothing is moved.

    Args:
        batch: model inputs; all that has an entry for each token moves with the tokens: token types, labels.
        model: that will read it; of an encoder-decoder, the labels are the decoder's.
    """
    found, of_decoder = dict(batch), bool(model.config.is_encoder_decoder)
    for prefix in ("", "decoder_"):
        ids, mask = batch.get(f"{prefix}input_ids"), batch.get(f"{prefix}attention_mask")
        if ids is None or mask is None or mask.dim() != 2 or f"{prefix}position_ids" in batch:
            continue
        before = _padding_before(mask.bool())
        if not bool(before.any()):
            continue
        for name, value in batch.items():
            own = name.startswith("decoder_") or (name == "labels" and of_decoder)
            if own == bool(prefix) and _is_by_token(name, value, ids):
                found[name] = _moved(value, before)
            elif name in ("start_positions", "end_positions") and not prefix and value.shape == before.shape:
                found[name] = torch.where(value >= before, value - before, value)  # of an answer among the tokens
    return found


def as_read(batch: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """What `model` reads of a batch of a collator's, whoever wrote that: `padded_right`, of padding that is marked.

    Where `position_ids` are given no mask is asked for: several texts of a row have none, for with one they would read
    each other.

    Args:
        batch: model inputs; what is no tensor is left as it is.
        model: that will read it.

    Raises:
        DataError: it has padding that no mask marks.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if "position_ids" not in tensors:
        check_marked(tensors, model)
    return {**batch, **padded_right(tensors, model)}


def _padding_before(real: Bool[Tensor, "rows tokens"]) -> Int[Tensor, "rows"]:
    """Padding before the first real token of each row; 0 in a row that has none."""
    return real.int().argmax(dim=1)


def _is_by_token(name: str, value: Tensor, ids: Int[Tensor, "rows tokens"]) -> bool:
    """Whether a value has an entry for each token; labels that are numbers with a fraction are a row's."""
    return value.shape[:2] == ids.shape and not (name == "labels" and value.is_floating_point())


def _moved(value: Tensor, before: Int[Tensor, "rows"]) -> Tensor:
    """Each row turned to the left by its own number of places: what stood before its tokens stands behind them."""
    width = value.shape[1]
    before = before.to(value.device)
    places = (torch.arange(width, device=value.device) + before[:, None]) % width
    return value[torch.arange(len(value), device=value.device)[:, None], places]
