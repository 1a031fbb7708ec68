"""What a causal language model writes after prompts: the one way for training on a model's own text and for scoring it.

Stands above `data`, whose rows are prompts, and below everything that asks for text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from makd.anatomy.limits import token_limit
from makd.errors import DataError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many there are."""

    max_new_tokens: int = 128
    """Tokens that are written after a prompt, at most; fewer where the model's positions end."""
    temperature: float | None = 1.0
    """Logits are divided by it; None takes the likeliest token."""
    top_p: float = 1.0
    """The likeliest tokens that have this probability together, in (0, 1]."""


def stop_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens that end a text of `model`, by its generation config and its config; none if neither says."""
    stops: list[int] = []
    for config in (model.generation_config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        stops += [] if found is None else [found] if isinstance(found, int) else list(found)
    return tuple(dict.fromkeys(stops))


@torch.no_grad()
def complete(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int | Sequence[int] = 0
) -> list[list[int]]:
    """What `model` writes after each of `prompts`, in one batch, padded on the left.

    Args:
        model: a causal language model; its dropout is off meanwhile.
        prompts: token ids, with all that stands before a text.
        sampling: how.
        seed: of the sampling; torch's own random numbers are as before afterwards.

    Returns:
        The new tokens of each, up to and with the first of `stop_tokens`.

    Raises:
        DataError: a prompt is empty, or leaves no position for a token.
    """
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise DataError("A prompt is empty: there is nothing to write on after it. Begin it with the tokenizer's mark.")
    limit = token_limit(model)
    room = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - longest)
    if room < 1:
        raise DataError(
            f"A prompt has {longest} tokens, and the model reads {limit}: no room to write. Lower data.max_length, or "
            "leave out long prompts."
        )
    stops = stop_tokens(model)
    filler = stops[0] if stops else 0
    ids = torch.tensor([[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    chance = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=room, eos_token_id=list(stops) or None, pad_token_id=filler, use_cache=True,
        **({"do_sample": False} if sampling.temperature is None else chance),
    )  # fmt: skip
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type), _writing(model, settings):
        torch.manual_seed(_one_seed(seed))
        generate: Any = model.generate
        written: Tensor = generate(ids, attention_mask=mask)
    return [_up_to_stop(row, stops) for row in written[:, longest:].tolist()]


@contextmanager
def _writing(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Without dropout, and with these settings alone: `generate` fills in what they leave open by the model's own."""
    training, own = model.training, model.generation_config
    model.generation_config = settings
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _up_to_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return tokens[: end + 1]


def _one_seed(parts: int | Sequence[int]) -> int:
    """One seed of several numbers, which two different rows of them do not share."""
    if isinstance(parts, int):
        return parts
    return int(np.random.SeedSequence(list(parts)).generate_state(1, "uint64")[0] >> 1)
