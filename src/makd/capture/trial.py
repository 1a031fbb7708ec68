"""Station 4: an anatomy tried out: a few tokens tell whether a model's tensors are what makd takes them for.

    resolve (from names) -> a forward, every tensor listened to -> another with other padding -> what failed is off

A name does not say that the model changes a tensor after it was noted, has tokens before batch, adds streams, or pads
texts inside. Whoever trusts what `capture` hears, or counts tokens in what linears read, begins with `examine`.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Inspection, Layer, Role, describe, resolve
from makd.capture.attention import attention_implementation, attention_is_noted, check_float32
from makd.capture.listening import CHANGED, differ, listen
from makd.capture.recording import Tap
from makd.capture.routed import faulty_experts
from makd.errors import UnsupportedModelError
from makd.kinds import takes
from makd.random_state import keeping_random_state

LENGTHS = (7, 5, 3)
"""Real tokens of the three rows that are tried, and of the targets of an encoder-decoder. Batch (3), tokens (7, 6) and
what a model's sizes usually are differ, so that no dimension passes for another."""
TARGET_LENGTHS = (6, 4, 2)
_RELATED = (Role.QUERY, Role.KEY, Role.VALUE)


@takes
def inspect(model: PreTrainedModel) -> Inspection:
    """What makd sees in `model`: where everything is, what is off, and why.

    Raises:
        UnsupportedModelError: its linears cannot be told apart, or it does not read token ids.
    """
    return describe(model, examine(model))


def examine(model: PreTrainedModel) -> Anatomy:
    """`resolve(model)`, with everything off that a forward shows not to be what it is taken for.

    The forward is that of a copy, which shares the parameters: modes, buffers, hooks, random numbers and gradients of
    `model` are as they were. A model whose weights are on the meta device is not tried, which a note says. What was
    found is kept as long as the model is, and looked for again when its structure or config is another.

    Raises:
        UnsupportedModelError: its linears cannot be told apart, or it cannot be run on token ids alone, or in its dtype
            by its attention; or a model without a head gives something else than hidden states.
    """
    anatomy = resolve(model)
    state = (anatomy, model.config.to_dict(), attention_implementation(model))
    known = _KNOWN.get(model)
    if known is None or known[0] != state:
        known = _KNOWN[model] = (state, _examine(model, anatomy))
    return known[1]


_KNOWN: "WeakKeyDictionary[PreTrainedModel, tuple[Any, Anatomy]]" = WeakKeyDictionary()


def _examine(model: PreTrainedModel, anatomy: Anatomy) -> Anatomy:
    if any(parameter.is_meta for parameter in model.parameters()):
        return replace(anatomy, notes=(*anatomy.notes, "weights are not in memory, so no forward was tried"))
    implementation = attention_implementation(model)
    if not attention_is_noted(implementation):
        if model.device.type == "cpu" and not torch.accelerator.is_available():
            raise UnsupportedModelError(
                f"{type(model).__name__} has attention implementation {implementation!r}, which has no "
                "backward on the CPU. Call model.set_attn_implementation('sdpa'), or load it so."
            )
        reason = f"{implementation!r} gives attention masks that are no tensors; load it with 'sdpa'"
        anatomy = replace(anatomy, off={**anatomy.off, "attention": reason})
    tried = _copy_of(model).eval()
    if tried.dtype == torch.float32:
        check_float32(tried)
    inputs = _inputs(model)
    with torch.no_grad(), keeping_random_state():  # BigBird seeds numpy's in each forward
        first = listen(tried, anatomy, inputs)
        other = listen(tried, anatomy, _with_other_padding(inputs))
        faults = first.faults | other.faults
        if own := differ(first.output, other.output):
            again = differ(first.output, listen(tried, anatomy, inputs).output)
        else:
            faults = faults | {
                tap: "what stands in the padding changes"
                for tap, heard in first.heard.items()
                if tap not in faults and differ(heard, other.heard[tap])
            }
        experts = faulty_experts(tried, anatomy, inputs)
    anatomy = replace(anatomy, layers=tuple(_with_apart(layer, first.apart) for layer in anatomy.layers))
    notes, solvers_off = anatomy.notes, dict(anatomy.solvers_off)
    if experts:
        notes += (f"experts of {min(experts)} (and {len(experts) - 1} others) stay dense: {min(experts.values())}",)
        anatomy = replace(anatomy, stacks=tuple(stack for stack in anatomy.stacks if stack.module not in experts))
    if first.breaks:
        solvers_off["in_forward_order"] = f"{first.breaks[0]} does not read what the layer before it gives"
    if own:
        notes += (_OWN_CHANCE if again else _OWN_PADDING,)
    return _without(replace(anatomy, notes=notes, solvers_off=solvers_off), faults)


_OWN_PADDING = (
    "its own outputs depend on what stands in the padding, so on the texts that share a batch; batches of equal "
    "lengths keep that small"
)
_OWN_CHANCE = "two forwards of the same text differ, in eval mode, so a student cannot equal it"


def _copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """One that shares the parameters of `model`, and nothing else: some models change themselves in a forward.

    Where these are of several dtypes, which only autocast can run together, it has its own, in float32.
    """
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        own: PreTrainedModel = copy.deepcopy(model).float()
        return own
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    lengths = (_long_enough(model.config), *LENGTHS[1:])
    inputs = dict(zip(("input_ids", "attention_mask"), _ids(model, lengths), strict=True))
    if getattr(model.config, "is_encoder_decoder", False):
        targets = _ids(model, TARGET_LENGTHS)
        inputs |= dict(zip(("decoder_input_ids", "decoder_attention_mask"), targets, strict=True))
    return inputs


def _long_enough(config: Any) -> int:
    """Tokens of the first row: odd, and more than a model takes for a short text, which BigBird reads otherwise."""
    if getattr(config, "attention_type", None) != "block_sparse":
        return LENGTHS[0]
    tokens = (5 + 2 * int(config.num_random_blocks)) * int(config.block_size) + LENGTHS[0]
    return tokens if tokens <= int(config.max_position_embeddings) else LENGTHS[0]


def _ids(model: PreTrainedModel, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ids and mask, (rows, tokens): ordinary tokens, and the padding token where a row has ended."""
    config: Any = model.config.get_text_config()
    size, padding = int(getattr(config, "vocab_size", None) or 64), getattr(config, "pad_token_id", None)
    named = [value for name, value in vars(config).items() if name.endswith("token_id")]
    special = {token for value in named for token in (value if isinstance(value, list | tuple) else (value,))}
    usual = [token for token in range(min(size, 100)) if token not in special] or [0]
    mask = torch.tensor([[place < length for place in range(max(lengths))] for length in lengths])
    places = torch.arange(mask.numel()).reshape(mask.shape)
    ids = torch.tensor(usual)[places % len(usual)]
    ids = torch.where(mask, ids, padding if isinstance(padding, int) and 0 <= padding < size else usual[0])
    return ids.to(model.device), mask.long().to(model.device)


def _with_other_padding(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    changed = dict(inputs)
    for prefix in ("", "decoder_"):
        if f"{prefix}input_ids" in inputs:
            ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"].bool()
            changed[f"{prefix}input_ids"] = torch.where(mask, ids, ids[0, 3])
    return changed


def _with_apart(layer: Layer, apart: Mapping[int, frozenset[Role]]) -> Layer:
    return replace(layer, apart=layer.apart | apart[layer.index]) if layer.index in apart else layer


def _without(anatomy: Anatomy, faults: Mapping[Tap, str]) -> Anatomy:
    """`anatomy` with the aspects and solvers off that would look at what is at fault."""
    off, solvers_off = dict(anatomy.off), dict(anatomy.solvers_off)
    for tap, fault in faults.items():
        layer = anatomy.layers[tap.layer]
        if tap.kind == "hidden":
            reason = f"the hidden states of {layer.module} {fault}"
            off.setdefault("hidden", reason)
            solvers_off.setdefault("in_forward_order", reason)
        elif tap.kind == "experts":
            off.setdefault("experts", f"what the experts of {layer.module} give {fault}")
        elif tap.role is None:
            where = layer.cross_attention if tap.kind == "cross_attention" else layer.attention
            off.setdefault("attention", f"queries and keys of {where} {fault}")
        else:
            reason = f"outputs of {layer.roles[tap.role].module} ({tap.role.value}) {fault}"
            off.setdefault("matrix", reason)
            if tap.role.base in _RELATED:
                off.setdefault("relation", reason)
            solvers_off.setdefault("in_forward_order", reason)
            if fault != CHANGED:  # what a linear reads has the layout of what it gives
                solvers_off.setdefault("inputs", reason)
                solvers_off.setdefault("gradients", reason)
    return replace(anatomy, off=off, solvers_off=solvers_off)
