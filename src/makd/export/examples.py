"""Inputs that a model is traced with and compared on: several shapes, padded as users pad."""

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.limits import token_limit
from makd.anatomy.sizes import embedding_shape
from makd.errors import ExportError

Inputs = dict[str, Tensor]
SHAPES = ((3, 11), (1, 1), (2, 7), (1, 40))
"""Rows and tokens of the inputs that are compared. The first is traced: two different numbers, neither of them 1."""


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[str, ...]:
    """Which of a tokenizer's outputs `model` takes, in the order of its forward.

    Without a tokenizer: ids, mask, and types of tokens where the model has any.
    """
    taken = inspect.signature(model.forward).parameters
    if tokenizer is None:
        has_types = getattr(model.config, "type_vocab_size", 0) > 1
        made = ("input_ids", "attention_mask", *(("token_type_ids",) if has_types else ()))
    else:
        made = tuple(tokenizer.model_input_names)
    return tuple(name for name in taken if name in made or name == "attention_mask")


def forward_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[str, ...]:
    """What a whole forward is given: `input_names`, and the ids that an encoder-decoder's decoder reads."""
    names = input_names(model, tokenizer)
    return (*names, "decoder_input_ids") if model.config.is_encoder_decoder else names


def check_one_attention(model: PreTrainedModel) -> None:
    """Refuse a model that reads long texts in another way than short ones: a traced program has one way.

    Raises:
        ExportError: it is a block-sparse BigBird, with positions for texts that it reads so.
    """
    config = model.config
    if getattr(config, "attention_type", None) == "block_sparse":
        full = (5 + 2 * int(config.num_random_blocks)) * int(config.block_size)
        if int(config.max_position_embeddings) > full:
            raise ExportError(
                f"{type(model).__name__} attends to all of texts of at most {full} tokens, and to blocks of longer "
                'ones; a program has one way for all. Set "attention_type": "original_full" in its config.json to '
                "export it with whole attention."
            )


def examples(model: PreTrainedModel, names: Sequence[str], seed: int = 0) -> Iterator[Inputs]:
    """Random ids in rows of several lengths, the shorter ones padded: on the right, on the left for a decoder.

    Args:
        model: whose vocabulary the ids are of; shapes beyond its positions are left out.
        names: of the inputs, as `input_names` or `forward_names` says.
        seed: of the ids.
    """
    limit = token_limit(model)
    vocabulary = embedding_shape(model)[0]
    generator = torch.Generator().manual_seed(seed)
    for rows, length in SHAPES:
        if limit is not None and length > limit:
            continue
        ids = torch.randint(vocabulary, (rows, length), generator=generator, device="cpu")
        kept = torch.tensor([max(1, length - 2 * row) for row in range(rows)])[:, None]
        mask = (torch.arange(length) < kept).long()
        if is_decoder(model):
            mask = mask.flip(1)
        padding = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
        inputs = {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}
        if "token_type_ids" in names:
            kinds = getattr(model.config, "type_vocab_size", 0) or 1
            inputs["token_type_ids"] = torch.randint(kinds, (rows, length), generator=generator, device="cpu")
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
        yield {name: inputs[name] for name in names}


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether `model` writes text token by token, and reads no other text first."""
    return model.can_generate() and not model.config.is_encoder_decoder
