"""What a language model writes after prompts, the same for the same seed.

The one way of it, for training on a model's own text and for scoring it. Stands above `data`, whose rows are prompts.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from makd.anatomy.eval_mode import in_eval
from makd.anatomy.limits import token_limit
from makd.data.prompts import pad_prompts
from makd.data.rendering import answer_ends
from makd.devices import widest_dtype
from makd.errors import DataError

logger = logging.getLogger(__name__)

_BEGIN = ("decoder_start_token_id", "bos_token_id", "forced_bos_token_id")
"""Settings of a generation config, or of a config, that say how a decoder begins: with which language, for one."""


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

    def settings(self, stops: Sequence[int], padding: int, begin: Mapping[str, int | None]) -> GenerationConfig:
        """For `generate`, with everything said that a model's own generation config could say otherwise.

        What is drawn, is drawn by a processor of the logits: `generate` has one random state for all rows.

        Args:
            stops: tokens that end a text.
            padding: token of places that hold none.
            begin: how a decoder begins: of `_BEGIN`.
        """
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(stops) or None,
            pad_token_id=padding,
            use_cache=True,
            **begin,
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
    places: Sequence[int] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Tokens that `model` writes after each of `prompts`, in their order, up to the first of `stops`, which is kept.

    Prompts of like length share a batch, padded on the left, where the model goes on from their ends; on the right for
    an encoder-decoder, which writes apart from what it reads. Of a model that reads padded prompts otherwise than alone
    (BART's relatives count positions from the padding on) those of one length do. Dropout is off meanwhile. What is
    drawn for a prompt depends on `seed` and its place alone, not on the batch that it is in; torch's random state is
    left as it is.

    A model in pieces (FSDP2) is called equally often in all processes, each of which has to come here, without prompts,
    too.

    Args:
        model: a causal language model, or an encoder-decoder with such a head.
        prompts: token ids, at least one each.
        sampling: how the next token is chosen, and how many there may be.
        stops: tokens that end a text.
        padding: token that stands before shorter prompts; it is masked.
        seed: of what is drawn.
        batch_size: prompts of a batch.
        places: number of each prompt; None numbers them in their order.
        on_batch: called with (prompts that are done, of how many).

    Raises:
        DataError: a prompt is empty, or leaves no position for a token.
    """
    if not all(prompts):
        raise DataError("A prompt is empty: there is nothing to write on after it. Begin it with the tokenizer's mark.")
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    written: list[list[int]] = [[] for _ in prompts]
    numbers = range(len(prompts)) if places is None else places
    apart = bool(model.config.is_encoder_decoder)
    begin = _beginning(model) if apart else {}
    write = partial(_write, model, sampling=sampling, stops=stops, padding=padding, begin=begin, seed=seed)
    with _without_own_settings(model):
        one_length = not apart and _reads_padding(model, padding)
        widths = [1 if apart else len(prompt) for prompt in prompts]
        calls = [*_batches(model, order, widths, sampling, batch_size, one_length)]
        idle = _most_calls(model, len(calls)) - len(calls)
        done = 0
        for batch in calls:
            rows = write([prompts[place] for place in batch], [numbers[place] for place in batch])
            for place, row in zip(batch, rows, strict=True):
                written[place] = row
            done += len(batch)
            if on_batch is not None:
                on_batch(done, len(order))
        for _ in range(idle):
            write([[padding]], [0])
    return written


def _write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    places: Sequence[int],
    *,
    sampling: Sampling,
    stops: Sequence[int],
    padding: int,
    begin: Mapping[str, int | None],
    seed: int | Sequence[int],
) -> list[list[int]]:
    """What is written after the prompts of one batch; `begin` is how a decoder begins."""
    apart = bool(model.config.is_encoder_decoder)
    inputs = pad_prompts(prompts, padding, "right" if apart else "left")
    width = 1 if apart else inputs["input_ids"].shape[1]  # tokens before the first that is written
    chosen = replace(sampling, max_new_tokens=_room(model, width, sampling))
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    tokens: Tensor = model.generate(  # type: ignore[operator]
        **inputs,
        generation_config=chosen.settings(stops, padding, begin),
        logits_processor=_drawing(chosen, seed, places, width, model.device),
    )
    return [_until_stop(row, stops) for row in tokens[:, width:].tolist()]


def _most_calls(model: PreTrainedModel, own: int) -> int:
    """How often the process with the most batches calls a model whose pieces all have to give at once; `own`, whole."""
    if not isinstance(model, FSDPModule) or not torch.distributed.is_initialized():
        return own
    counts = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, own)
    return max(counts)


_TRIED = 4
"""Tokens of the prompt that is tried, and of the padding before it."""
_READ_PADDING: "WeakKeyDictionary[PreTrainedModel, bool]" = WeakKeyDictionary()


def _reads_padding(model: PreTrainedModel, padding: int) -> bool:
    """Whether a prompt that is padded on the left is read otherwise than alone; a few tokens are enough, once a model.

    A model in pieces is called by all processes, so this does not depend on the prompts of any.
    """
    if model not in _READ_PADDING:
        limit = token_limit(model)
        _READ_PADDING[model] = True if limit is not None and limit <= 2 * _TRIED else _differs_padded(model, padding)
    return _READ_PADDING[model]


def _differs_padded(model: PreTrainedModel, padding: int) -> bool:
    vocabulary = model.config.get_text_config().vocab_size
    prompt = [token for token in range(_TRIED + 1) if token != padding % vocabulary][:_TRIED]
    settings = Sampling(max_new_tokens=1, temperature=0.0).settings((), padding, {})
    settings.output_logits = settings.return_dict_in_generate = True
    seen = []
    for before in (0, _TRIED):
        ids = torch.tensor([[padding] * before + prompt], device=model.device)
        mask = torch.tensor([[0] * before + [1] * _TRIED], device=model.device)
        found: Any = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
        seen.append(found.logits[0].float())
    alone, padded = seen
    rough = model.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(model.device.type)
    return not float((padded - alone).norm()) <= (5e-2 if rough else 1e-3) * float(alone.norm())


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """Tokens that end a text, in training and in evaluation alike.

    Those of the model's generation config and config, the tokenizer's EOS, and the token by which its chat template
    ends an answer. The last is told of where none of the others names it: other programs would not stop there.
    """
    found: set[int] = set()
    for owner in (model.generation_config, model.config.get_text_config(), tokenizer):
        own = getattr(owner, "eos_token_id", None)
        found |= set() if own is None else {own} if isinstance(own, int) else set(own)
    ends = set() if tokenizer is None else set(answer_ends(tokenizer))
    for token in ends - found:
        _warn_end(str(tokenizer.convert_ids_to_tokens(token)))  # type: ignore[union-attr]
    return sorted(found | ends)


@cache
def _warn_end(token: str) -> None:
    """Once: both models of a run are asked, and more than once."""
    logger.warning(
        "The tokenizer's chat template ends an answer with %s, which neither it nor the model names as an end "
        "(eos_token_id): what is written stops there all the same. Name it in the model's generation_config.json, or "
        "other programs write past it",
        token,
    )


def _beginning(model: PreTrainedModel) -> dict[str, int | None]:
    """How the decoder of an encoder-decoder begins, as its own settings say."""
    owners = (model.generation_config, model.config)
    return {
        name: next((value for owner in owners if (value := getattr(owner, name, None)) is not None), None)
        for name in _BEGIN
    }


def _batches(
    model: PreTrainedModel,
    order: Sequence[int],
    widths: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    one_length: bool,
) -> Iterator[list[int]]:
    """Places in batches: prompts that leave less room than is asked for are with those of their length alone.

    With `one_length`, all are.
    """
    limit = token_limit(model)
    room = sampling.max_new_tokens
    tight = [place for place in order if one_length or (limit is not None and widths[place] + room > limit)]
    for _, alike in groupby(tight, key=widths.__getitem__):  # in the order of their lengths
        own = [*alike]
        yield from (own[start : start + batch_size] for start in range(0, len(own), batch_size))
    roomy = [] if one_length else [place for place in order if limit is None or widths[place] + room <= limit]
    yield from (roomy[start : start + batch_size] for start in range(0, len(roomy), batch_size))


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


def _drawing(
    sampling: Sampling, seed: int | Sequence[int], places: Sequence[int], width: int, device: torch.device
) -> LogitsProcessorList:
    """What chooses the next token of each row; nothing where it is the likeliest."""
    if sampling.temperature == 0:
        return LogitsProcessorList()
    parts = [seed] if isinstance(seed, int) else list(seed)
    draws = np.stack([np.random.default_rng([*parts, place]).random(sampling.max_new_tokens) for place in places])
    found = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    found.append(_Draw(torch.from_numpy(1 - draws).to(device, widest_dtype(device)), width))
    return found


class _Draw(LogitsProcessor):
    """Leaves one token of each row: where the probabilities, added up, reach the row's number for this step."""

    def __init__(self, draws: Float[Tensor, "rows steps"], width: int) -> None:
        self.draws, self.width = draws, width  # in (0, 1]; tokens before the first that is drawn

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        reached = scores.to(self.draws.dtype).softmax(-1).cumsum(-1)
        wanted = self.draws[:, input_ids.shape[1] - self.width, None] * reached[:, -1:]
        chosen = (reached < wanted).sum(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


def _until_stop(row: list[int], stops: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Inside, dropout is off and the model's own generation config says nothing: transformers fills gaps from it."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with in_eval(model):
            yield
    finally:
        model.generation_config = before
