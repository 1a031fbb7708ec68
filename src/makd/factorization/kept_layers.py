"""Station 3: layers of the student that are made already, for a process that goes on after one that was killed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Layer
from makd.calibration import entries
from makd.calibration.source import ModelSource
from makd.calibration.store import Store
from makd.ranks.planning import RankAssignment
from makd.ranks.sharing import units_of
from makd.solvers.factors import Factors
from makd.student.shared_linear import replace_linears_


def keep_layer(store: Store, student: nn.Module, layer: Layer) -> None:
    """Write the parameters of a layer to the store; those without values are the teacher's, and left out."""
    found = {f"{layer.module}.{name}": one for name, one in student.get_submodule(layer.module).named_parameters()}
    store.write(
        entries.layer_parameters(layer.index), {name: one.detach() for name, one in found.items() if not one.is_meta}
    )


class KeptStudent(ModelSource):
    """A student in memory, of which each layer is kept when it has been worked on."""

    def __init__(self, model: PreTrainedModel, store: Store) -> None:
        """`model` is a copy of the teacher, and becomes the student."""
        super().__init__(model)
        self.store = store

    @contextmanager
    def layer(self, layer: Layer) -> Iterator[None]:
        """See `LayerSource`."""
        yield
        keep_layer(self.store, self.model, layer)


@torch.no_grad()
def restore_layers_(
    student: PreTrainedModel,
    anatomy: Anatomy,
    store: Store,
    planned: RankAssignment,
    cut_stacks: Callable[[Layer], Mapping[str, object]],
) -> None:
    """Put the layers that are made already into `student`, a copy of the teacher in memory.

    Args:
        student: changed in place.
        anatomy: of the teacher.
        store: has the layers.
        planned: ranks, and which linears share one A.
        cut_stacks: puts factors of a layer's experts into `student`.
    """
    ranks, shared = planned.plan.ranks, [group.linears for group in planned.groups]
    for layer in anatomy.layers:
        if not store.is_marked(entries.student_states(layer.index + 1)):
            return
        cut_stacks(layer)
        kept = store.read(entries.layer_parameters(layer.index), student.device)
        factored = [name for name in layer.linears if ranks.get(name) is not None]
        for unit in units_of(factored, shared):
            expand = torch.cat([kept[f"{name}.expand.weight"] for name in unit])
            replace_linears_(student, unit, Factors(expand, kept[f"{unit[0]}.reduce.weight"], error=0.0))
        for name, values in kept.items():  # biases, experts, and what was taught besides
            student.get_parameter(name).copy_(values)
