"""Station 6: what a plan needs of a teacher, by name, and where it is found after the teacher's forward.

    hidden.3                a layer's output
    linear.3.q              the output of a role's linear
    attention.3.query       query and key as attention gets them, for a scale of head_dim ** -0.5; cross_attention.3.key
                            likewise
    embedding.mean          a text's pooled vector
    logits, start_logits    what a head over labels, numbers or the tokens of a text gives
    predictions.*           predictions over a vocabulary: the likeliest tokens, and the rest as one

Real tokens only, a row's after another's; padding is never kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Role, predictions_of
from makd.anatomy.tokens import decoder_tokens, encoder_tokens
from makd.aspects import ActivePlan, Place, keep_predictions
from makd.cache.encoding import encode, encode_exactly, encode_log_probabilities, encode_tokens
from makd.cache.settings import CacheConfig
from makd.capture import AttentionCall, HeadCall, Recording, Tap, has_vocabulary_head, why_not_repeated
from makd.errors import CacheError, SettingError
from makd.sentence_encoder import pool

Axis = Literal["text", "encoder", "decoder"]
"""What a part has one entry for: each text of a batch, or each token that one of the stacks reads."""
Stored = dict[str, tuple[Axis, Tensor]]
"""Name -> its axis, and what is stored, one entry after another along dimension 0."""
PREDICTIONS = "predictions"
_LOGITS_BYTES = 2**26
"""Logits over a vocabulary that exist at a time: 64 MB."""


@dataclass(frozen=True)
class Need:
    """Something that a plan compares with."""

    part: str
    aspect: str


def needs(plan: ActivePlan, model: PreTrainedModel) -> list[Need]:
    """Every part that `plan` compares with, once, and the aspect that first asks for it.

    Args:
        plan: fitted to `model`, or to a student of it.
        model: one of the pair: both have the same kind of head.

    Raises:
        SettingError: the predictions of `model` cannot be kept.
    """
    found: dict[str, Need] = {}
    for active in plan.terms:
        for part in _parts_of(active.place, active.teacher_taps, active.term.pooling, active.term.temperature, model):
            found.setdefault(part, Need(part, active.term.aspect))
    return list(found.values())


def _parts_of(
    place: Place, taps: tuple[Tap, ...], pooling: str, temperature: float, model: PreTrainedModel
) -> Iterator[str]:
    for tap in taps:
        yield from names(tap)
    if place == "embedding":
        yield f"embedding.{pooling}"
    elif place == "predictions" and has_vocabulary_head(model):
        reason = why_not_repeated(model)
        if reason is not None:
            raise SettingError(
                f"Predictions of {type(model).__name__} cannot be cached: {reason}. Leave out the aspect 'logits', or "
                "train without a cache."
            )
        yield from (f"{PREDICTIONS}.{name}" for name in ("tokens", "log_probabilities", missing(temperature)))
    elif place == "predictions":
        predictions = predictions_of(model)
        yield from () if predictions is None else predictions.outputs


def check_top_k(plan: ActivePlan, student: PreTrainedModel, kept: int, vocabulary: int | None, where: str) -> None:
    """Refuse `kept` likeliest tokens that are not enough for what `plan` tells apart.

    Args:
        plan: fitted to the models.
        student: who learns from them, or the teacher.
        kept: how many are, or will be.
        vocabulary: tokens in all; None without predictions over one.
        where: as a person calls it.

    Raises:
        CacheError: `kept` is smaller than the `k` of a term.
    """
    for active in plan.terms:
        if active.place != "predictions" or active.term.divergence != "top_k" or not has_vocabulary_head(student):
            continue
        if active.term.k > kept and kept < (vocabulary or 0):
            raise CacheError(
                f"The plan tells {active.term.k} tokens apart, {where} {kept}. Lower the term's k, "
                f"or make the cache with --cache.top_k {active.term.k}."
            )


def names(tap: Tap) -> tuple[str, ...]:
    """The parts that a tap is kept as."""
    if tap.kind in ("hidden", "experts"):
        return (f"{tap.kind}.{tap.layer}",)
    if tap.kind == "linear":
        assert tap.role is not None
        return (f"linear.{tap.layer}.{tap.role.value}",)
    return f"{tap.kind}.{tap.layer}.query", f"{tap.kind}.{tap.layer}.key"


def missing(temperature: float) -> str:
    """Name of the part that has the missing mass at a temperature."""
    return f"log_missing_{temperature:g}"


def axes(anatomy: Anatomy, tap: Tap) -> tuple[Axis, ...]:
    """What the parts of a tap have one entry for, in the order of `names`."""
    own: Axis = "decoder" if anatomy.is_encoder_decoder and anatomy.layers[tap.layer].stack == "decoder" else "encoder"
    if tap.kind == "linear":
        return ("encoder",) if tap.role in (Role.CROSS_KEY, Role.CROSS_VALUE) else (own,)
    return (own, "encoder" if tap.kind == "cross_attention" else own)[: len(names(tap))]


def last_axis(anatomy: Anatomy) -> Axis:
    """What predictions and embeddings are made of: tokens of the only stack, or of the decoder."""
    return "decoder" if anatomy.is_encoder_decoder else "encoder"


def real_tokens(axis: Axis, inputs: Mapping[str, Tensor]) -> Tensor:
    """True at the tokens of a batch that parts of `axis` have an entry for, (batch, tokens)."""
    return decoder_tokens(inputs) if axis == "decoder" else encoder_tokens(inputs)


def extract(
    plan: ActivePlan,
    anatomy: Anatomy,
    inputs: Mapping[str, Tensor],
    recording: Recording,
    output: Any,
    head: HeadCall | None,
    settings: CacheConfig,
) -> Stored:
    """What is kept of a teacher's forward on a batch.

    Raises:
        SettingError: the attention adds a learned bias, or numbers are too large for the dtype.
        NumericsError: the teacher gives NaN or infinity on real tokens.
    """
    stored: Stored = {}
    for tap in plan.teacher_taps:
        tensors = _states(tap, recording)
        for name, axis, tensor in zip(names(tap), axes(anatomy, tap), tensors, strict=True):
            mask = real_tokens(axis, inputs)
            # OPT joins rows before its feed-forward: every tensor is given its (batch, tokens) back
            values = tensor.reshape(*mask.shape, *tensor.shape[2:] if tensor.dim() == 4 else (-1,))[mask]
            stored |= _on(axis, encode(name, values, settings.dtype))
    last = last_axis(anatomy)
    mask = real_tokens(last, inputs)
    for active in plan.terms:
        if active.place == "embedding":
            vectors = pool(output[0], mask, active.term.pooling)
            stored |= _on("text", encode_exactly(f"embedding.{active.term.pooling}", vectors, settings.dtype))
    temperatures = {active.term.temperature for active in plan.terms if active.place == "predictions"}
    if not temperatures:
        return stored
    if head is not None:
        return stored | _on(last, _predictions(head, mask, settings, tuple(sorted(temperatures))))
    predictions = anatomy.predictions
    assert predictions is not None  # `activate` has no logits term without
    predictions.read(output)  # says so where they are not there
    by_token = predictions.each == "token" or predictions.target == "places"
    for name in predictions.outputs:
        values = output[name][mask] if by_token else output[name]
        stored |= _on(last if by_token else "text", encode_exactly(name, values, settings.dtype))
    return stored


def _states(tap: Tap, recording: Recording) -> tuple[Tensor, ...]:
    """Tensors with tokens on dimension 1: (batch, tokens, features), of attention (batch, tokens, heads, head_dim)."""
    if tap in recording.tensors:
        return (recording.tensors[tap],)
    call: AttentionCall = recording.attention[tap]
    if call.position_bias is not None:
        raise SettingError(
            f"Attention of layer {tap.layer} adds a learned bias to its scores, which the cache does not hold. Leave "
            "out the aspect 'attention', or train without a cache."
        )
    usual = call.query.shape[-1] ** -0.5
    query = call.query if call.scale == usual else call.query * (call.scale / usual)  # so that no scale has to be kept
    return query.transpose(1, 2), call.key.transpose(1, 2)


def _predictions(
    call: HeadCall, mask: Tensor, settings: CacheConfig, temperatures: tuple[float, ...]
) -> dict[str, Tensor]:
    assert call.inputs is not None
    inputs = call.inputs[mask]
    vocabulary = len(call.head.weight)
    step = max(1, _LOGITS_BYTES // (4 * vocabulary))
    kept = [
        keep_predictions(call.head.logits(part), settings.top_k, temperatures)
        for part in inputs.split(step)
        if len(part)
    ]
    tokens, log_probabilities = (
        torch.cat([getattr(part, name) for part in kept]) for name in ("tokens", "log_probabilities")
    )
    stored = encode_tokens(f"{PREDICTIONS}.tokens", tokens, vocabulary)
    stored |= encode_log_probabilities(f"{PREDICTIONS}.log_probabilities", log_probabilities, settings.dtype)
    for temperature in temperatures:
        mass = torch.cat([part.log_missing[temperature] for part in kept])
        stored[f"{PREDICTIONS}.{missing(temperature)}"] = mass
    return stored


def _on(axis: Axis, tensors: Mapping[str, Tensor]) -> Stored:
    return {name: (axis, tensor.cpu()) for name, tensor in tensors.items()}
