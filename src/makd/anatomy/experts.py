"""Station 1: mixtures of experts. Routed experts stay dense; they are found to be counted, and to be said."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from makd.anatomy.roles import Anatomy, Layer, Role

_FEED_FORWARD = (Role.GATE, Role.UP, Role.DOWN)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_experts(model: nn.Module, layers: Sequence[Layer]) -> tuple[str, ...]:
    """Names of the parameters of routed experts in these layers, each once.

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


def count_experts(model: nn.Module, anatomy: Anatomy) -> int:
    """How many parameters the routed experts have together."""
    return sum(model.get_parameter(name).numel() for name in anatomy.experts)


def tell_experts(model: nn.Module, layers: Sequence[Layer], experts: Sequence[str]) -> tuple[str, ...]:
    """A line about the experts, and whose the feed-forward's roles are; none where there are none."""
    if not experts:
        return ()
    number = sum(model.get_parameter(name).numel() for name in experts)
    layer = next(layer for layer in layers if any(name.startswith(f"{layer.module}.") for name in experts))
    inside = experts[0].removeprefix(f"{layer.module}.").rpartition(".")[0]
    roles = [role for role in _FEED_FORWARD if role in layer.roles]
    others = ", ".join(f"{role.value} = {layer.roles[role].module.removeprefix(f'{layer.module}.')}" for role in roles)
    told = f"are what every token goes through alone ({others})" if roles else "are nobody's beside them"
    return (
        f"mixture of experts: the routed ones ({inside}, {number:,} parameters) stay dense, and count as kept in a "
        f"budget of linears; the feed-forward's roles {told}",
    )


def names_expert(module_name: str, module: nn.Module) -> bool:
    """Whether a module is, or holds, routed experts, by its own name or its class."""
    words = f"{module_name.rpartition('.')[2]} {type(module).__name__}".lower()
    return "expert" in words and "shared" not in words and not isinstance(module, nn.Linear)


def _of_layer(layer: nn.Module, counts: frozenset[int]) -> Iterator[str]:
    inside: list[str] = []
    for name, module in layer.named_modules():
        if name and any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if name and names_expert(name, module):
            inside.append(name)
            yield from (f"{name}.{parameter}" for parameter, _ in module.named_parameters())
        elif not isinstance(module, _CONVOLUTIONS):
            for parameter, value in module.named_parameters(prefix=name, recurse=False):
                if value.dim() == 3 and value.shape[0] in counts:
                    yield parameter


def _expert_counts(config: Any) -> frozenset[int]:
    """Numbers of experts that a config names."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = vars(text).items() if text is not None else ()
    return frozenset(
        value for name, value in values if "expert" in name and type(value) is int and value > 1 and "per" not in name
    )
