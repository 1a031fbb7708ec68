"""Station 9: what became of each linear, as a row that a report shows."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Layer, linear_shape
from makd.evaluation.inside import LayerErrors
from makd.factorization.outcome import FactorizeReport
from makd.ranks.allocation import LinearSize


def linear_rows(
    student: PreTrainedModel, anatomy: Anatomy, made: FactorizeReport | None, inside: Mapping[str, LayerErrors]
) -> list[dict[str, Any]]:
    """A row for each linear, and each stack of experts, in forward order.

    Args:
        student: perhaps empty.
        anatomy: of the student.
        made: what factorization said of it; None where this run did not factorize.
        inside: when -> what was measured then.
    """
    groups = (
        {} if made is None else {name: one.linears for one in made.shared_inputs if one.shared for name in one.linears}
    )
    rows = []
    for layer in anatomy.layers:
        if layer.call > 0:
            continue  # the same modules again
        for name in layer.linears:
            module = _find(student, name)
            if module is None:
                continue
            size = LinearSize(name, *linear_shape(module), getattr(module, "bias", None) is not None)
            rows.append(_row(size, layer, roles_of(layer, name), module, made, inside, groups.get(name, (name,))))
        for stack in anatomy.stacks_of(layer):
            found = _find(student, stack.module)
            leaf = None if found is None else getattr(found, stack.leaf, None)
            if leaf is None:
                continue
            shared: Any = getattr(leaf, "shared", "")
            size = LinearSize(stack.name, stack.out_features, stack.in_features, stack.has_bias, stack.experts, shared)
            rows.append(_row(size, layer, [f"experts.{stack.leaf}"], leaf, made, inside, (stack.name,)))
    return rows


def roles_of(layer: Layer, name: str) -> list[str]:
    """The roles that a linear plays in a layer; a fused one has several."""
    return [role.value for role, linear in layer.roles.items() if linear.module == name]


def _row(
    size: LinearSize,
    layer: Layer,
    roles: list[str],
    module: Any,
    made: FactorizeReport | None,
    inside: Mapping[str, LayerErrors],
    together: tuple[str, ...],
) -> dict[str, Any]:
    rank = getattr(module, "rank", None)
    why = None if made is None else made.dense.get(size.name)
    return {
        "name": size.name,
        "layer": layer.index,
        "stack": layer.stack,
        "roles": roles,
        "out_features": size.out_features,
        "in_features": size.in_features,
        "experts": size.experts,
        "rank": rank,
        "break_even": size.break_even,
        "weights": size.weights(rank),
        "weights_dense": size.dense,
        "why_dense": None if rank is not None else why or "it was dense in the student that this run began with",
        "shares_input_with": [name for name in together if name != size.name],
        "predicted_error": None if made is None else made.errors.get(size.name),
        "measured_error": {when: found.linears.get(size.name) for when, found in inside.items()},
        "fallback": None if made is None else made.fallbacks.get(size.name),
    }


def _find(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name; None in a layer that the student does without."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
