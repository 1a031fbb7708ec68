"""Station 8: what a causal language model writes after prompts, the same for the same seed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


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
            eos_token_id=list(stops),
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
    seed: int,
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Tokens that `model` writes after each of `prompts`, in their order, up to the first of `stops`, which is kept.

    Prompts of like length share a batch, padded on the left. What is drawn depends on `seed`, the prompts and the batch
    size alone, and torch's random state is afterwards as it was.

    Args:
        model: a causal language model.
        prompts: token ids, at least one each.
        sampling: how the next token is chosen, and how many there may be.
        stops: tokens that end a text.
        padding: token that stands before shorter prompts; it is masked.
        seed: of what is drawn.
        batch_size: prompts of a batch.
        on_batch: called with (prompts that are done, of how many).
    """
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    written: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type), _without_own_settings(model):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            inputs = pad_left([prompts[place] for place in places], padding, model.device)
            tokens: Tensor = model.generate(
                **inputs,  # type: ignore[operator]
                generation_config=sampling.settings(stops, padding),
            )
            width = inputs["input_ids"].shape[1]
            for place, row in zip(places, tokens[:, width:].tolist(), strict=True):
                written[place] = _until_stop(row, stops)
            if on_batch is not None:
                on_batch(start + len(places), len(order))
    model.train(was_training)
    return written


def pad_left(prompts: Sequence[Sequence[int]], padding: int, device: torch.device) -> dict[str, Tensor]:
    """A batch whose rows end together, as a model goes on from them: `input_ids` and `attention_mask`."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: the tokenizer's EOS, and those of the model's own generation config."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [] if own is None else [own] if isinstance(own, int) else list(own)
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return sorted(set(found))


def _until_stop(row: list[int], stops: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's own generation config says nothing: transformers fills what is not said from it."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
