"""Which tokens of a batch are real, for each stack of a model: what stands in the padding never counts."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from makd.anatomy.roles import Anatomy, Layer, Role
from makd.errors import DataError


def encoder_tokens(inputs: Mapping[str, Tensor]) -> Bool[Tensor, "batch tokens"]:
    """Real tokens of the (only, or the encoder's) stack that reads `input_ids`.

    Raises:
        DataError: the batch has no `input_ids`, or nothing but padding.
    """
    if "input_ids" not in inputs:
        raise DataError(f"A batch needs `input_ids`; this one has {', '.join(map(repr, inputs)) or 'nothing'}.")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not bool(real.any()):
        raise DataError(
            f"A batch of shape {tuple(ids.shape)} is all padding: its attention_mask is 0 everywhere. "
            "Drop empty texts from the data."
        )
    return real


def decoder_tokens(inputs: Mapping[str, Tensor]) -> Bool[Tensor, "batch tokens"]:
    """Real target tokens of an encoder-decoder: by `decoder_attention_mask`, else by labels other than -100.

    Raises:
        DataError: the batch has neither `decoder_input_ids` nor `labels`.
    """
    if "decoder_attention_mask" in inputs:
        return inputs["decoder_attention_mask"].bool()
    if "labels" in inputs:
        return inputs["labels"] != -100
    if "decoder_input_ids" in inputs:
        return torch.ones_like(inputs["decoder_input_ids"], dtype=torch.bool)
    raise DataError("An encoder-decoder's batch needs `decoder_input_ids` or `labels` besides `input_ids`.")


def layer_tokens(anatomy: Anatomy, layer: Layer, inputs: Mapping[str, Tensor]) -> Bool[Tensor, "batch tokens"]:
    """Real tokens among those that `layer` sees (its queries)."""
    if anatomy.is_encoder_decoder and layer.stack == "decoder":
        return decoder_tokens(inputs)
    return encoder_tokens(inputs)


def role_tokens(
    anatomy: Anatomy, layer: Layer, role: Role, inputs: Mapping[str, Tensor]
) -> Bool[Tensor, "batch tokens"]:
    """Real tokens among those that a role's linear reads: a cross-attention's keys and values read the encoder's."""
    if role in (Role.CROSS_KEY, Role.CROSS_VALUE):
        return encoder_tokens(inputs)
    return layer_tokens(anatomy, layer, inputs)
