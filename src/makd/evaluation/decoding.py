"""Station 8: how fast causal language models read a prompt and write after it, in turns, with keys and values kept."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy.sizes import embedding_shape
from makd.errors import SettingError
from makd.evaluation.clock import Timing, take_turns
from makd.progress import OnProgress, Progress

WARM_UP = 1
"""Turns that are not counted. A turn writes many tokens, each of which is a forward."""


@dataclass(frozen=True, kw_only=True)
class DecodingTiming:
    """One model's generation in one batch, without padding."""

    model: str
    batch: int
    length: int
    """Tokens of a prompt."""
    new_tokens: int
    """Tokens that are written after each, one at a time, whatever they are."""
    prompt: Timing
    """One forward that reads the prompts and keeps their keys and values."""
    writing: Timing
    """The forwards that write, together. Ratios are to the teacher's in the same turn."""

    @property
    def read_per_second(self) -> float:
        """Tokens of prompts."""
        return 1000 * self.batch * self.length / self.prompt.milliseconds

    @property
    def written_per_second(self) -> float:
        """New tokens."""
        return 1000 * self.batch * self.new_tokens / self.writing.milliseconds


def time_decoding(
    models: Mapping[str, PreTrainedModel],
    points: Sequence[tuple[int, int]],
    new_tokens: int,
    repeats: int,
    progress: OnProgress,
) -> tuple[DecodingTiming, ...]:
    """Each model's generation at each of `points`.

    Args:
        models: name -> causal language model, in eval mode, on one device; ratios are to the first.
        points: (batch, tokens of a prompt).
        new_tokens: tokens that are written after each prompt.
        repeats: turns that count.
        progress: called with a `Progress` after each point.

    Raises:
        SettingError: a model keeps no keys and values.
    """
    rows: list[DecodingTiming] = []
    device = next(iter(models.values())).device
    for done, (batch, length) in enumerate(points, start=1):
        ids = random_ids(list(models.values()), batch, length)
        reading = {name: partial(_read, model, ids) for name, model in models.items()}
        writing = {name: partial(_write, model, reading[name](), new_tokens) for name, model in models.items()}
        prompts, written = (take_turns(things, repeats, device, WARM_UP) for things in (reading, writing))
        rows += [
            DecodingTiming(
                model=name, batch=batch, length=length, new_tokens=new_tokens, prompt=prompts[name],
                writing=written[name],
            )
            for name in models
        ]  # fmt: skip
        progress(Progress("time generation", done, len(points), "shapes"))
    return tuple(rows)


def random_ids(models: Sequence[PreTrainedModel], batch: int, length: int) -> Tensor:
    """Token ids that all `models` know, `length` in each of `batch` rows, the same in every run."""
    vocabulary = min(embedding_shape(model)[0] for model in models)
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0), device="cpu")
    return ids.to(models[0].device)


@torch.no_grad()
def _read(model: PreTrainedModel, ids: Tensor) -> tuple[Any, Tensor]:
    """Keys and values of `ids`, and the likeliest next tokens; of the predictions only the last, as in generation."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=ids, use_cache=True, **last)
    kept = getattr(output, _cache_name(model), None)
    if kept is None:
        raise SettingError(
            f"{type(model).__name__} keeps no keys and values, so its generation is not timed. Set new_tokens to 0."
        )
    return kept, output.logits[:, -1:].argmax(-1)


@torch.no_grad()
def _write(model: PreTrainedModel, read: tuple[Any, Tensor], new_tokens: int) -> None:
    """Write `new_tokens` after what was `read`, which stays as it is."""
    kept, token, name = copy.deepcopy(read[0]), read[1], _cache_name(model)
    for _ in range(new_tokens):
        output = model(input_ids=token, use_cache=True, **{name: kept})
        kept, token = getattr(output, name), output.logits[:, -1:].argmax(-1)


def _cache_name(model: PreTrainedModel) -> str:
    """What transformers calls keys and values that are kept: renamed in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
