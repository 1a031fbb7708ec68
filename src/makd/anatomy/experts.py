"""Station 1: mixtures of experts: which parameters are routed experts', and which of them may get factors."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from makd.anatomy.roles import FEED_FORWARD_ROLES, Anatomy, ExpertStack, Layer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FIRST, _LAST = ("gate_up_proj", "up_proj"), "down_proj"


def find_experts(model: nn.Module, layers: Sequence[Layer]) -> tuple[str, ...]:
    """Names of the parameters of routed experts in these layers, each once; of factored ones those of the dense.

    They stand under a module whose name or class says so, or as a stack (experts, in, out) of as many matrices as the
    config has experts. What is called shared is none: every token goes through it.
    """
    counts = _expert_counts(getattr(model, "config", None))
    return tuple(
        dict.fromkeys(
            f"{layer.module}.{name}"
            for layer in layers
            for name in _of_layer(model.get_submodule(layer.module), counts)
        )
    )


def find_stacks(model: nn.Module, layers: Sequence[Layer]) -> tuple[tuple[ExpertStack, ...], str | None]:
    """The experts' matrices that may be factorized; and why others may not, where there are others."""
    stacks: list[ExpertStack] = []
    why: str | None = None
    for layer in layers:
        for name in _expert_modules(model.get_submodule(layer.module)):
            module = model.get_submodule(f"{layer.module}.{name}")
            found = read_stacks(f"{layer.module}.{name}", layer.index, module)
            stacks += found
            why = why if found else _why_unreadable(module)
    return tuple(stacks), why


def read_stacks(name: str, layer: int, module: nn.Module) -> tuple[ExpertStack, ...]:
    """The stacks of a module of routed experts, called `name`, in a layer; none where it cannot be read."""
    return tuple(_stacks(name, layer, module)) if _why_unreadable(module) is None else ()


def count_experts(model: nn.Module, anatomy: Anatomy) -> int:
    """How many parameters the routed experts have together, in factors or not."""
    modules = dict.fromkeys(stack.module for stack in find_stacks(model, anatomy.layers)[0])
    inside = tuple(f"{name}." for name in modules)
    found = [p for name in modules for p in model.get_submodule(name).parameters()]
    found += [model.get_parameter(name) for name in anatomy.experts if not name.startswith(inside)]
    return sum({id(p): p.numel() for p in found}.values())


def describe_experts(
    layers: Sequence[Layer],
    experts: Sequence[str],
    stacks: Sequence[ExpertStack],
    why_dense: str | None,
) -> tuple[str, ...]:
    """A line about the experts, and whose the feed-forward's roles are; none where there are none."""
    if not experts:
        return ()
    layer = next(layer for layer in layers if any(name.startswith(f"{layer.module}.") for name in experts))
    inside = experts[0].removeprefix(f"{layer.module}.").rpartition(".")[0]
    roles = [role for role in FEED_FORWARD_ROLES if role in layer.roles]
    others = ", ".join(f"{role.value} = {layer.roles[role].module.removeprefix(f'{layer.module}.')}" for role in roles)
    told = f"are what every token goes through alone ({others})" if roles else "are nobody's beside them"
    first = next((stack for stack in stacks), None)
    ways = []
    if first is not None:
        leaves = ", ".join(dict.fromkeys(stack.leaf for stack in stacks))
        ways.append(f"may get factors, one rank for all {first.experts} of a layer ({leaves})")
    if why_dense is not None or first is None:
        ways.append(f"stay dense, and count as kept in a budget of linears{f': {why_dense}' if why_dense else ''}")
    return (
        f"mixture of experts: the routed ones ({inside}) {'; others '.join(ways)}; the feed-forward's roles {told}",
    )


def names_expert(module_name: str, module: nn.Module) -> bool:
    """Whether a module is, or holds, routed experts, by its own name, or by its class where that says nothing."""
    words = module_name.rpartition(".")[2].lower()
    if "expert" not in words:  # a class may have `Shared` from its model (GraniteMoeSharedExperts)
        words += f" {type(module).__name__}".lower()
    return "expert" in words and "shared" not in words and not isinstance(module, nn.Linear)


def takes_rows_by_expert(module: nn.Module) -> bool:
    """Whether experts are handed a row of every token for each of them (Llama 4), instead of who is to go where."""
    cls = getattr(module, "architecture", type(module))
    return len(inspect.signature(cls.forward).parameters) == 2


def _expert_modules(layer: nn.Module) -> Iterator[str]:
    """The outermost modules that hold routed experts."""
    inside: list[str] = []
    for name, module in layer.named_modules():
        if name and not any(name.startswith(f"{outer}.") for outer in inside) and names_expert(name, module):
            inside.append(name)
            yield name


def _why_unreadable(module: nn.Module) -> str | None:
    """Why the experts of a module cannot get factors; None where they can.

    What can be read is how transformers builds nearly all of them: every expert's matrices in one parameter each, and
    class-wide words on how they are laid out.
    """
    first = next((leaf for leaf in _FIRST if hasattr(module, leaf)), None)
    if first is None or not hasattr(module, _LAST):
        return "they are no stacks of up and down projections"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm of their own stands behind each"
    known = {f"{leaf}{end}" for leaf in (first, _LAST) for end in ("", "_bias")}
    found = {name.split(".")[0] for name, _ in module.named_parameters()}
    if not found <= known:
        return f"it is not known what {min(found - known)} does in them"
    decorated = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    if not decorated and not (takes_rows_by_expert(module) and hasattr(module, "act_fn")):
        return "how their matrices are laid out is not told"
    matrices = (getattr(module, first), getattr(module, _LAST))
    if any(not hasattr(one, "experts") and len(getattr(one, "shape", ())) != 3 for one in matrices):
        return "they are no stacks of up and down projections"
    return None


def _stacks(name: str, layer: int, module: nn.Module) -> Iterator[ExpertStack]:
    first = next(leaf for leaf in _FIRST if hasattr(module, leaf))
    transposed = bool(getattr(module, "is_transposed", True))
    for leaf in (first, _LAST):
        stack: Any = getattr(module, leaf)
        if hasattr(stack, "experts"):  # in factors
            experts, out_features, in_features = stack.experts, stack.out_features, stack.in_features
        else:
            experts, out_features, in_features = stack.shape
            if transposed:
                out_features, in_features = in_features, out_features
        has_bias = getattr(module, f"{leaf}_bias", None) is not None
        yield ExpertStack(name, leaf, layer, int(experts), int(out_features), int(in_features), has_bias)


def _of_layer(layer: nn.Module, counts: frozenset[int]) -> Iterator[str]:
    modules = tuple(_expert_modules(layer))
    for name, module in layer.named_modules():
        if any(name.startswith(f"{outer}.") for outer in modules):
            continue
        if name in modules:
            names = (parameter for parameter, _ in module.named_parameters())
            yield from sorted({f"{name}.{_dense_name(module, parameter)}" for parameter in names})
        elif not isinstance(module, _CONVOLUTIONS):
            for parameter, value in module.named_parameters(prefix=name, recurse=False):
                if value.dim() == 3 and value.shape[0] in counts:
                    yield parameter


def _dense_name(module: nn.Module, parameter: str) -> str:
    """What a parameter of experts is called while these are dense."""
    return parameter.split(".")[0] if hasattr(module, "architecture") else parameter


def _expert_counts(config: Any) -> frozenset[int]:
    """Numbers of experts that a config names."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = vars(text).items() if text is not None else ()
    return frozenset(
        value for name, value in values if "expert" in name and type(value) is int and value > 1 and "per" not in name
    )
