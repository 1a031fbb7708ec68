"""Station 1: what `makd inspect` shows: layers, roles, shapes, parameters, and at which rank factors begin to save."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from makd.anatomy.experts import count_experts
from makd.anatomy.resolve import linear_shape
from makd.anatomy.roles import Anatomy
from makd.anatomy.sizes import total_parameters, whole_numbers


@dataclass(frozen=True)
class LinearRow:
    """One factorizable linear."""

    layers: tuple[int, ...]
    """Indices of the layers that call it; more than one for shared layers."""
    roles: tuple[str, ...]
    module: str
    out_features: int
    in_features: int
    parameters: int
    """Weights and bias."""
    bias: bool
    """Whether it adds one. A factored linear has the bias of the one it replaced."""
    break_even_rank: int
    """Largest rank at which factors have fewer weights than the matrix."""


@dataclass(frozen=True)
class Inspection:
    """What makd sees in a model. Printed by rich, it is a table."""

    model: str
    anatomy: Anatomy
    linears: tuple[LinearRow, ...]
    parameters: int
    """All of them, shared ones once."""
    linear_parameters: int
    """Of the factorizable linears, with their biases; shared ones once."""
    embedding_parameters: int
    """Of the token embeddings."""
    expert_parameters: int = 0
    """Of routed experts."""

    @property
    def linear_share(self) -> float:
        """Linears' parameters / all parameters: what makd can make smaller."""
        return self.linear_parameters / self.parameters

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Group]:
        """The table, and lines about what is off."""
        yield to_table(self)

    def __str__(self) -> str:
        """`to_table` as plain text."""
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(to_table(self))
        return capture.get()


def break_even_rank(out_features: int, in_features: int) -> int:
    """Largest rank r with r (out + in) < out · in."""
    return (out_features * in_features - 1) // (out_features + in_features)


def describe(model: PreTrainedModel, anatomy: Anatomy) -> Inspection:
    """`anatomy` with shapes and counts."""
    rows = []
    for name in anatomy.linears:
        places = [
            (layer.index, role.value)
            for layer in anatomy.layers
            for role, linear in layer.roles.items()
            if linear.module == name
        ]
        linear = model.get_submodule(name)
        out_features, in_features = linear_shape(linear)
        rows.append(
            LinearRow(
                layers=tuple(dict.fromkeys(index for index, _ in places)),
                roles=tuple(dict.fromkeys(role for _, role in places)),
                module=name,
                out_features=out_features,
                in_features=in_features,
                parameters=sum(parameter.numel() for parameter in linear.parameters()),
                bias=any(name.endswith("bias") for name, _ in linear.named_parameters()),
                break_even_rank=break_even_rank(out_features, in_features),
            )
        )
    return Inspection(
        model=type(model).__name__,
        anatomy=anatomy,
        linears=tuple(rows),
        parameters=total_parameters(model),
        linear_parameters=_count(model, anatomy.linears),
        embedding_parameters=_count(model, anatomy.embeddings),
        expert_parameters=count_experts(model, anatomy),
    )


def _count(model: PreTrainedModel, names: Iterable[str]) -> int:
    """Parameters of the modules `names`; one that several of them share counts once."""
    modules = [model.get_submodule(name) for name in names]
    parameters = {parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in parameters) + sum(map(whole_numbers, modules))


def inspection_content(inspection: Inspection) -> dict[str, Any]:
    """What `to_table` shows, with every linear in a row of its own, for machines."""
    anatomy = inspection.anatomy
    counts = {name: getattr(inspection, name) for name in inspection.__dataclass_fields__ if "parameters" in name}
    return {
        "model": inspection.model,
        "family": anatomy.family,
        **counts,
        "linears": [asdict(row) for row in inspection.linears],
        "notes": [*anatomy.notes],
        "aspects_off": dict(anatomy.off),
        "solvers_off": dict(anatomy.solvers_off),
    }


def to_table(inspection: Inspection) -> Group:
    """The linears of layers that look alike in one row each, totals, and what is off."""
    anatomy = inspection.anatomy
    table = Table(
        title=f"{inspection.model} ({anatomy.family})",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("layers", "role", "linear"):
        table.add_column(column, overflow="fold")
    for column in ("out x in", "bias", "parameters\neach", "break-even\nrank"):
        table.add_column(column, justify="right", no_wrap=True)
    for layers, row in _condensed(inspection):
        table.add_row(
            layers,
            ", ".join(row.roles),
            row.module,
            f"{row.out_features} x {row.in_features}",
            "yes" if row.bias else "no",
            f"{row.parameters:,}",
            str(row.break_even_rank),
        )
    lines = [
        f"parameters        {inspection.parameters:,}",
        f"  of the linears  {inspection.linear_parameters:,} ({inspection.linear_share:.1%}): what makd factorizes",
        *_expert_line(inspection),
        f"  of embeddings   {inspection.embedding_parameters:,}",
        *(f"note: {note}" for note in anatomy.notes),
        *(f"aspect {aspect} is off: {reason}" for aspect, reason in anatomy.off.items()),
        *(f"solvers that look at {what} are off: {reason}" for what, reason in anatomy.solvers_off.items()),
    ]
    return Group(table, Text("\n".join(lines)))


def _expert_line(inspection: Inspection) -> Iterator[str]:
    if inspection.expert_parameters:
        share = inspection.expert_parameters / inspection.parameters
        yield f"  of experts      {inspection.expert_parameters:,} ({share:.1%})"


def _condensed(inspection: Inspection) -> Iterator[tuple[str, LinearRow]]:
    """Rows that differ only in their layer's number, once, with the layers that they stand for."""
    layer_names = {layer.index: layer.module for layer in inspection.anatomy.layers}
    groups: dict[tuple[object, ...], tuple[str, list[LinearRow]]] = {}
    for row in inspection.linears:
        layer = layer_names[row.layers[0]]
        pattern = layer.rpartition(".")[0] + ".*" + row.module.removeprefix(layer)
        alike = (pattern, row.roles, row.out_features, row.in_features, row.parameters, row.bias)
        groups.setdefault(alike, (pattern, []))[1].append(row)
    for pattern, rows in groups.values():
        indices = sorted({index for row in rows for index in row.layers})
        yield _ranges(indices), rows[0] if len(rows) == 1 else replace(rows[0], module=pattern)


def _ranges(indices: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
