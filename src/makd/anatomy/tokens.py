"""Which tokens of a batch count: the real ones of each stack of a model, never padding; and those of completions."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from makd.anatomy.roles import Anatomy, Layer, Role
from makd.errors import DataError, UnsupportedModelError

IGNORE_INDEX = -100
"""Label of a token, or a row, that no loss looks at, as everywhere in torch and transformers."""


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
        return inputs["labels"] != IGNORE_INDEX
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


def completion_tokens(inputs: Mapping[str, Tensor]) -> Bool[Tensor, "batch tokens"]:
    """Real tokens that are a completion's: those that have a label.

    Raises:
        DataError: the batch has no label for each of its tokens.
    """
    labels, real = inputs.get("labels"), encoder_tokens(inputs)
    if labels is None or labels.shape != real.shape:
        shapes = (None if labels is None else tuple(labels.shape)), tuple(real.shape)
        found = "no labels" if labels is None else f"labels of shape {shapes[0]} for tokens of {shapes[1]}"
        raise DataError(
            f"Completions alone are to count (tokens: completion), and a batch has {found}. Give one label a token, "
            "-100 on what is no completion; or let all tokens count."
        )
    return real & (labels != IGNORE_INDEX)


def predicting_tokens(inputs: Mapping[str, Tensor], label_shift: int) -> Bool[Tensor, "batch tokens"]:
    """Real tokens whose prediction is of a completion's token.

    Args:
        inputs: the batch, with labels.
        label_shift: how many tokens after the one that it stands at a prediction is of: 1 for causal language models.

    Raises:
        DataError: the batch has no label for each of its tokens.
    """
    found = completion_tokens(inputs)
    if label_shift == 0:
        return found
    earlier = torch.zeros_like(found)
    earlier[:, :-label_shift] = found[:, label_shift:]
    return earlier & encoder_tokens(inputs)


def is_by_token(tensor: Tensor, real: Bool[Tensor, "batch tokens"]) -> bool:
    """Whether `tensor` has an entry for each of these tokens.

    That is (batch, tokens, ...), with its rows joined (OPT), or of one head (batch, 1, tokens, features), as latent
    attention keeps what keys and values are made from.
    """
    if tensor.dim() == 2:
        return len(tensor) == real.numel() or tensor.shape == real.shape
    of_one_head = tensor.dim() == 4 and tensor.shape[1] == 1 and (tensor.shape[0], tensor.shape[2]) == real.shape
    return tensor.shape[:2] == real.shape or of_one_head


def by_token(tensor: Tensor, real: Bool[Tensor, "batch tokens"], what: str) -> Float[Tensor, "batch tokens features"]:
    """`tensor` with batch and tokens as its first two dimensions, and all else as the third.

    Args:
        tensor: of one entry a token, in one of the layouts that `is_by_token` knows.
        real: whose shape says how many tokens there are.
        what: the tensor's name, for the error.

    Raises:
        UnsupportedModelError: it is laid out otherwise, so that real tokens and padding cannot be told apart in it.
    """
    if not is_by_token(tensor, real):
        raise UnsupportedModelError(
            f"{what} has the shape {tuple(tensor.shape)}, where (batch, tokens, ...) is {tuple(real.shape)} and more: "
            "which of its entries are real tokens cannot be told. Solver 'svd' looks at no tokens, and a plan of "
            "'logits', 'embedding' or 'task' at none inside the layers."
        )
    return tensor.reshape(*real.shape, -1)
