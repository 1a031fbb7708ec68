"""What a causal language model writes after prompts, the same for the same seed.

The one way of it, for training on a model's own text and for scoring it. Stands above `data`, whose rows are prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.limits import token_limit
from makd.data.prompts import pad_left
from makd.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Only the likeliest tokens that have this much of the probability together; 1 is all of them."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 is all of them."""
    max_new_tokens: int = 256

    def settings(self, stops: Sequence[int], padding: int) -> GenerationConfig:
        """The same for `generate`, with everything said that a model's own generation config could say otherwise."""
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            do_sample=self.temperature > 0,
            **(sampled if self.temperature > 0 else {}),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(stops) or None,
            pad_token_id=padding,
            use_cache=True,
        )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stops: Sequence[int],
    padding: int,
    *,
    seed: int | Sequence[int],
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Tokens that `model` writes after each of `prompts`, in their order, up to the first of `stops`, which is kept.

    Prompts of like length share a batch, padded on the left; dropout is off meanwhile. What is drawn depends on `seed`,
    the prompts and the batch size alone, and torch's random state is afterwards as it was.

    Args:
        model: a causal language model.
        prompts: token ids, at least one each.
        sampling: how the next token is chosen, and how many there may be.
        stops: tokens that end a text.
        padding: token that stands before shorter prompts; it is masked.
        seed: of what is drawn.
        batch_size: prompts of a batch.
        on_batch: called with (prompts that are done, of how many).

    Raises:
        DataError: a prompt is empty, or leaves no position for a token.
    """
    if not all(prompts):
        raise DataError("A prompt is empty: there is nothing to write on after it. Begin it with the tokenizer's mark.")
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    written: list[list[int]] = [[] for _ in prompts]
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type), _without_own_settings(model):
        torch.manual_seed(_one_seed(seed))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            inputs = pad_left([prompts[place] for place in places], padding)
            width = inputs["input_ids"].shape[1]
            settings = replace(sampling, max_new_tokens=_room(model, width, sampling)).settings(stops, padding)
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            tokens: Tensor = model.generate(**inputs, generation_config=settings)  # type: ignore[operator]
            for place, row in zip(places, tokens[:, width:].tolist(), strict=True):
                written[place] = _until_stop(row, stops)
            if on_batch is not None:
                on_batch(start + len(places), len(order))
    return written


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """Tokens that end a text: those of the model's generation config and config, and the tokenizer's EOS."""
    found: list[int] = []
    for owner in (model.generation_config, model.config.get_text_config(), tokenizer):
        own = getattr(owner, "eos_token_id", None)
        found += [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted(set(found))


def _room(model: PreTrainedModel, longest: int, sampling: Sampling) -> int:
    """How many tokens may be written: fewer than asked for where the model's positions end."""
    limit = token_limit(model)
    room = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - longest)
    if room < 1:
        raise DataError(
            f"A prompt has {longest} tokens, and the model reads {limit}: no room to write. Shorten the prompts, or "
            "leave out the long ones."
        )
    return room


def _one_seed(parts: int | Sequence[int]) -> int:
    """One seed of several numbers, which two different rows of them do not share."""
    if isinstance(parts, int):
        return parts
    return int(np.random.SeedSequence(list(parts)).generate_state(1, "uint64")[0] >> 1)


def _until_stop(row: list[int], stops: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Inside, dropout is off and the model's own generation config says nothing: transformers fills gaps from it."""
    before, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = before
        model.train(training)
