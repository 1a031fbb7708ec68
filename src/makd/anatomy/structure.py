"""Station 1: reading a model that no family names, from its structure, where only one reading is possible."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from makd.anatomy.experts import names_expert
from makd.anatomy.families import LATENT, Fused, Place, Stack
from makd.anatomy.roles import FEED_FORWARD_ROLES, Role
from makd.anatomy.skipped import SkippedLayer
from makd.errors import UnsupportedModelError

ENDINGS: Mapping[str, Role] = {
    **dict.fromkeys(("q", "query", "q_proj", "query_proj", "q_lin", "to_q", "wq", "q_b_proj"), Role.QUERY),
    **dict.fromkeys(("k", "key", "k_proj", "key_proj", "k_lin", "to_k", "wk"), Role.KEY),
    **dict.fromkeys(("v", "value", "v_proj", "value_proj", "v_lin", "to_v", "wv"), Role.VALUE),
    **dict.fromkeys(("o", "o_proj", "out_proj", "out_lin", "attention.output.dense", "attention.dense"), Role.OUTPUT),
    "q_a_proj": Role.QUERY_LATENT,
    **dict.fromkeys(("kv_a_proj_with_mqa", "kv_a_proj"), Role.KEY_VALUE_LATENT),
    **dict.fromkeys(("gate_proj", "wi_0"), Role.GATE),
    **dict.fromkeys(("up_proj", "fc1", "lin1", "c_fc", "wi", "wi_1", "intermediate.dense", "ffn"), Role.UP),
    **dict.fromkeys(("down_proj", "fc2", "lin2", "output.dense", "ffn_output"), Role.DOWN),
}
"""How a linear's name ends -> its role. The longest ending that fits counts."""

FROM_LATENT = "kv_b_proj"
"""How the linear's name ends that makes keys and values, head by head, from what `kv_latent` gives."""

NEEDED = (Role.QUERY, Role.KEY, Role.VALUE, Role.UP, Role.DOWN)


def find_stack(
    base: nn.Module, model_type: str, known: Sequence[str]
) -> tuple[Stack, tuple[str, ...], Mapping[str, str]]:
    """The one list of layers in `base` in which every role is played by one linear.

    The layers are built alike, but for feed-forwards that are a mixture of experts in some and one for all tokens in
    others. Where routed experts are all of a feed-forward, its roles are nobody's.

    Returns:
        The stack, lines that say what was found, and the aspects that are off with their reasons.

    Raises:
        UnsupportedModelError: there is no such list, or more than one.
    """
    readings = {name: reading for name, layers in _layer_lists(base) if (reading := _read_all(layers)) is not None}
    if len(readings) != 1:
        found = "no list of layers has" if not readings else f"several lists of layers ({', '.join(readings)}) have"
        raise UnsupportedModelError(
            f"makd does not know {type(base).__name__} (model type {model_type!r}), and cannot read it from its "
            f"structure: {found} one linear each for {', '.join(role.value for role in NEEDED)}. Known "
            f"model types: {', '.join(known)}. A new one is a row in "
            "makd/anatomy/table, or a Family of your own package."
        )
    (name, (same, feed_forwards)), *_ = readings.items()
    layers = base.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    attention, off = _attention(_first(layers), _module(same[Role.QUERY]))
    is_decoder = bool(getattr(getattr(base, "config", None), "is_decoder", False))
    places = [*same.items(), *(item for feed_forward in feed_forwards for item in feed_forward.items())]
    taken = {_module(place) for _, place in places}
    others = sorted({path for layer in layers for path, _ in _linears(layer)} - taken)
    notes = [
        f"{model_type!r} is not a known model type; from its structure: {len(layers)} layers in {name}, "
        + ", ".join(f"{role.value} = {_module(place)}" for role, place in places)
    ]
    if others:
        notes.append(f"these linears of a layer were not understood and stay as they are: {', '.join(others)}")
    apart = frozenset({Role.QUERY}) if Role.KEY_VALUE_LATENT in same else frozenset()  # keys and values read a latent
    kind: Literal["encoder", "decoder"] = "decoder" if is_decoder else "encoder"
    stack = Stack(kind, name, same, attention, variants=feed_forwards, apart=apart)
    return stack, tuple(notes), off


def is_factored(module: object) -> bool:
    """Whether a module is a linear in two factors. Stations before `student` know it by what it does."""
    return hasattr(module, "reduce") and hasattr(module, "expand")


def is_adapted(module: object) -> bool:
    """Whether a module is one with an adapter of peft around it, whose weight is not all that it applies."""
    return hasattr(module, "base_layer")


def _layer_lists(base: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules of one class, not inside one another."""
    seen: list[str] = []
    for name, module in base.named_modules():
        if any(name.startswith(outer + ".") for outer in seen):
            continue
        if not isinstance(module, nn.ModuleList):
            continue
        if len({type(item) for item in module if not isinstance(item, SkippedLayer)}) == 1:
            seen.append(name)
            yield name, module


def _first(layers: nn.ModuleList) -> nn.Module:
    """The first layer that is not dropped."""
    return next(layer for layer in layers if not isinstance(layer, SkippedLayer))


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linears of a layer; a factored or adapted one counts as one, and those of routed experts are none."""
    inside: list[str] = []
    for name, module in layer.named_modules():
        if any(name.startswith(outer + ".") for outer in inside):
            continue
        if name and names_expert(name, module):
            inside.append(name)
        elif isinstance(module, nn.Linear | Conv1D) or is_factored(module) or is_adapted(module):
            inside.append(name)
            yield name, module


Reading = tuple[Mapping[Role, Place], tuple[Mapping[Role, Place], ...]]
"""Roles that are the same in all layers, and the feed-forwards that differ, the one with most roles first."""


def _read_all(layers: nn.ModuleList) -> Reading | None:
    """Where the roles of a list of layers are; None where that is not clear."""
    found: list[Mapping[Role, Place]] = []
    for layer in layers:
        if isinstance(layer, SkippedLayer):
            continue
        roles = _read(layer)
        if roles is None:
            return None
        if roles not in found:
            found.append(roles)
    if len(found) == 1:
        return found[0], ()
    same = [{role: place for role, place in roles.items() if role not in FEED_FORWARD_ROLES} for roles in found]
    if any(roles != same[0] for roles in same):
        return None
    feed_forwards = [{role: place for role, place in roles.items() if role in FEED_FORWARD_ROLES} for roles in found]
    return same[0], tuple(sorted(feed_forwards, key=len, reverse=True))


def _read(layer: nn.Module) -> dict[Role, Place] | None:
    """Role -> linear of a layer; None where a needed role has none, or a role has two."""
    roles: dict[Role, Place] = {}
    for name, _ in _linears(layer):
        if f".{name}".endswith(f".{FROM_LATENT}"):
            found: dict[Role, Place] = {
                role: Fused(name, index, LATENT) for index, role in enumerate((Role.KEY, Role.VALUE))
            }
        elif endings := [ending for ending in ENDINGS if f".{name}".endswith(f".{ending}")]:
            found = {ENDINGS[max(endings, key=len)]: name}
        else:
            continue
        if roles.keys() & found.keys():
            return None
        roles |= found
    is_mixture = any(name and names_expert(name, module) for name, module in layer.named_modules())
    needed = [role for role in NEEDED if not (is_mixture and role in FEED_FORWARD_ROLES)]
    if not all(role in roles for role in needed) or (Role.UP in roles) != (Role.DOWN in roles):
        return None
    return roles


def _module(place: Place) -> str:
    return place.module if isinstance(place, Fused) else place


def _attention(layer: nn.Module, query: str) -> tuple[str | None, Mapping[str, str]]:
    """The module that holds the query's linear, if its code goes through transformers' attention interface."""
    holder = query.rpartition(".")[0]
    module = layer.get_submodule(holder)
    code = sys.modules.get(type(module).__module__)
    if hasattr(module, "sinks"):
        return None, {"attention": "its attention has sinks, which take a part of every softmax"}
    if holder and code is not None and hasattr(code, "ALL_ATTENTION_FUNCTIONS"):
        return holder, {}
    return None, {"attention": "its attention does not go through transformers' attention interface"}
