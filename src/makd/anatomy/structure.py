"""Station 1: reading a model that no family names, from its structure, where only one reading is possible."""

import sys
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from makd.anatomy.experts import names_expert
from makd.anatomy.families import Place, Stack
from makd.anatomy.roles import Role
from makd.anatomy.skipped import SkippedLayer
from makd.errors import UnsupportedModelError

ENDINGS: Mapping[str, Role] = {
    **dict.fromkeys(("q", "query", "q_proj", "query_proj", "q_lin", "to_q", "wq"), Role.QUERY),
    **dict.fromkeys(("k", "key", "k_proj", "key_proj", "k_lin", "to_k", "wk"), Role.KEY),
    **dict.fromkeys(("v", "value", "v_proj", "value_proj", "v_lin", "to_v", "wv"), Role.VALUE),
    **dict.fromkeys(("o", "o_proj", "out_proj", "out_lin", "attention.output.dense", "attention.dense"), Role.OUTPUT),
    **dict.fromkeys(("gate_proj", "wi_0"), Role.GATE),
    **dict.fromkeys(("up_proj", "fc1", "lin1", "c_fc", "wi", "wi_1", "intermediate.dense", "ffn"), Role.UP),
    **dict.fromkeys(("down_proj", "fc2", "lin2", "output.dense", "ffn_output"), Role.DOWN),
}
"""How a linear's name ends -> its role. The longest ending that fits counts."""

NEEDED = (Role.QUERY, Role.KEY, Role.VALUE, Role.UP, Role.DOWN)


def find_stack(
    base: nn.Module, model_type: str, known: Sequence[str]
) -> tuple[Stack, tuple[str, ...], Mapping[str, str]]:
    """The one list of equal layers in `base` in which every role is played by one linear.

    Returns:
        The stack, lines that say what was found, and the aspects that are off with their reasons.

    Raises:
        UnsupportedModelError: there is no such list, or more than one.
    """
    readings = {name: reading for name, layers in _layer_lists(base) if (reading := _read(_first(layers))) is not None}
    if len(readings) != 1:
        found = "no list of layers has" if not readings else f"several lists of layers ({', '.join(readings)}) have"
        experts = next((path for path, module in base.named_modules() if names_expert(path, module)), None)
        mixture = f" Its feed-forwards are experts ({experts}), which makd cannot take in yet." if experts else ""
        raise UnsupportedModelError(
            f"makd does not know {type(base).__name__} (model type {model_type!r}), and cannot read it from its "
            f"structure: {found} one linear each for {', '.join(role.value for role in NEEDED)}.{mixture} Known "
            f"model types: {', '.join(known)}. A new one is a row in makd/anatomy/table."
        )
    (name, linears), *_ = readings.items()
    layers = base.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    attention, off = _attention(_first(layers), linears[Role.QUERY])
    kind = "decoder" if bool(getattr(getattr(base, "config", None), "is_decoder", False)) else "encoder"
    others = sorted(path for path, _ in _linears(_first(layers)) if path not in linears.values())
    notes = [
        f"{model_type!r} is not a known model type; from its structure: {len(layers)} layers in {name}, "
        + ", ".join(f"{role.value} = {path}" for role, path in linears.items())
    ]
    if others:
        notes.append(f"these linears of a layer were not understood and stay as they are: {', '.join(others)}")
    places: Mapping[Role, Place] = dict(linears)
    stack = Stack("decoder" if kind == "decoder" else "encoder", name, places, attention)
    return stack, tuple(notes), off


def is_factored(module: object) -> bool:
    """Whether a module is a linear in two factors. Stations before `student` know it by what it does."""
    return hasattr(module, "reduce") and hasattr(module, "expand")


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
    """Linears of a layer; a factored one counts as one."""
    inside: list[str] = []
    for name, module in layer.named_modules():
        if any(name.startswith(outer + ".") for outer in inside):
            continue
        if isinstance(module, nn.Linear | Conv1D) or is_factored(module):
            inside.append(name)
            yield name, module


def _read(layer: nn.Module) -> dict[Role, str] | None:
    """Role -> linear of a layer; None where a needed role has none, or a role has two."""
    roles: dict[Role, str] = {}
    for name, _ in _linears(layer):
        endings = [ending for ending in ENDINGS if f".{name}".endswith(f".{ending}")]
        if not endings:
            continue
        role = ENDINGS[max(endings, key=len)]
        if role in roles:
            return None
        roles[role] = name
    return roles if all(role in roles for role in NEEDED) else None


def _attention(layer: nn.Module, query: str) -> tuple[str | None, Mapping[str, str]]:
    """The module that holds the query's linear, if its code goes through transformers' attention interface."""
    holder = query.rpartition(".")[0]
    code = sys.modules.get(type(layer.get_submodule(holder)).__module__)
    if holder and code is not None and hasattr(code, "ALL_ATTENTION_FUNCTIONS"):
        return holder, {}
    return None, {"attention": "its attention does not go through transformers' attention interface"}
