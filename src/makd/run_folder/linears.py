"""Station 9: what became of each linear, as a row that a report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Layer, linear_shape
from makd.evaluation.inside import LayerErrors
from makd.factorization.outcome import FactorizeReport
from makd.ranks.allocation import LinearSize
from makd.student.linear import LowRankLinear


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
    groups = _sharing_one_a(student, anatomy)
    rows = []
    for layer in anatomy.layers:
        if layer.call > 0:
            continue  # the same modules again
        for name in layer.linears:
            module = _find(student, name)
            if module is None:
                continue
            size = _size(name, module)
            rows.append(_row(size, layer, roles_of(layer, name), module, made, inside, groups.get(name, [size])))
        for stack in anatomy.stacks_of(layer):
            found = _find(student, stack.module)
            leaf = None if found is None else getattr(found, stack.leaf, None)
            if leaf is None:
                continue
            shared: Any = getattr(leaf, "shared", "")
            size = LinearSize(stack.name, stack.out_features, stack.in_features, stack.has_bias, stack.experts, shared)
            rows.append(_row(size, layer, [f"experts.{stack.leaf}"], leaf, made, inside, [size]))
    return rows


def _sharing_one_a(student: PreTrainedModel, anatomy: Anatomy) -> dict[str, list[LinearSize]]:
    """Each factored linear -> those that have its A, itself among them; first the one that holds it."""
    users: dict[nn.Module, list[LinearSize]] = {}
    for name in anatomy.linears:
        module = _find(student, name)
        if isinstance(module, LowRankLinear):
            users.setdefault(module.reduce, []).append(_size(name, module))
    return {size.name: sizes for sizes in users.values() for size in sizes}


def _size(name: str, module: nn.Module) -> LinearSize:
    return LinearSize(name, *linear_shape(module), getattr(module, "bias", None) is not None)


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
    group: Sequence[LinearSize],
) -> dict[str, Any]:
    """`group` are the linears that share one A, which is counted where it is held: in the row of the first."""
    together = replace(size, out_features=sum(one.out_features for one in group))
    follows = group[0].name != size.name
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
        "break_even": together.break_even,
        "weights": rank * size.out_features if follows and rank is not None else size.weights(rank),
        "weights_dense": size.dense,
        "why_dense": None if rank is not None else why or "it was dense in the student that this run began with",
        "shares_input_with": [one.name for one in group if one.name != size.name],
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
