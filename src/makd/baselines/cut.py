"""Baselines: a dense student's first weights, copied from its teacher, or cut out where the student is narrower.

A cut keeps the same channels everywhere: hidden channels by the size of their token embeddings, a head's by the sizes
of the rows that make them, a feed-forward's neurons by the size of what goes in and comes out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from makd.anatomy import Anatomy, Layer, Role, resolve
from makd.errors import SettingError

_OF_HEADS = (Role.QUERY, Role.KEY, Role.VALUE)


@torch.no_grad()
def copy_weights_(student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Give `student` the teacher's weights, cut to its sizes.

    Args:
        student: of the teacher's class; changed in place.
        teacher: as large or larger.
        layers: the teacher's layer for each of the student's.

    Returns:
        The student, in eval mode, on the teacher's device and in its dtype.

    Raises:
        SettingError: a tensor's sizes do not say what to keep (fused linears), or the student is wider somewhere.
    """
    ours, theirs = resolve(student), resolve(teacher)
    pairs = {layer.module: theirs.layers[index] for layer, index in zip(ours.layers, layers, strict=True)}
    cut = _Cut(student, teacher, theirs)
    known = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        layer = next((module for module in pairs if name.startswith(f"{module}.")), None)
        source = name if layer is None else pairs[layer].module + name.removeprefix(layer)
        found = cut.take(known[source], tensor, source, None if layer is None else pairs[layer])
        tensor.copy_(found)
    torch.nn.Module.to(student, device=teacher.device, dtype=teacher.dtype)
    student.eval()
    return student


class _Cut:
    """Which channels stay."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, anatomy: Anatomy) -> None:
        self.teacher = teacher
        ours, theirs = student.config, teacher.config
        self.hidden = (theirs.hidden_size, ours.hidden_size)
        self.neurons = (theirs.intermediate_size, ours.intermediate_size)
        self.head = tuple(
            getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads for c in (theirs, ours)
        )
        self.is_fused = any(role.part is not None for layer in anatomy.layers for role in layer.roles.values())
        size = teacher.get_input_embeddings().get_parameter("weight").float().norm(dim=0)
        # factorized embeddings (ELECTRA) have another width: then nothing tells channels apart
        size = size if len(size) == self.hidden[0] else torch.ones(self.hidden[0])
        self.channels = _largest(size, min(self.hidden))

    def take(self, tensor: Tensor, wanted: Tensor, name: str, layer: Layer | None) -> Tensor:
        """`tensor` of the teacher, called `name`, cut to the shape of `wanted`."""
        role = (
            None
            if layer is None
            else next((r for r, x in layer.roles.items() if name.startswith(f"{x.module}.")), None)
        )
        for axis, (there, here) in enumerate(zip(tensor.shape, wanted.shape, strict=True)):
            if there != here:
                tensor = tensor.index_select(axis, self._kept(axis, there, here, name, layer, role).to(tensor.device))
        return tensor

    def _kept(self, axis: int, there: int, here: int, name: str, layer: Layer | None, role: Role | None) -> Tensor:
        assert layer is not None or role is None
        if here > there:
            raise SettingError(
                f"The student is wider than its teacher: {name} has {here} instead of {there}. Take initial='random'."
            )
        is_head = (role in _OF_HEADS and axis == 0) or (role is Role.OUTPUT and axis == 1)
        if is_head and layer is not None and there % self.head[0] == 0:
            return self._of_heads(layer, role is Role.VALUE or role is Role.OUTPUT, there // self.head[0])
        if (there, here) == self.neurons and layer is not None and not self._ends_in_stream(role, axis):
            return self._of_feed_forward(layer)
        if (there, here) == self.hidden:
            return self.channels
        raise SettingError(
            f"makd cannot tell which {here} of {there} in {name} of {type(self.teacher).__name__} belong together. "
            "Take initial='random'."
        )

    @staticmethod
    def _ends_in_stream(role: Role | None, axis: int) -> bool:
        """Whether an axis of a layer's tensor is of hidden channels, though a feed-forward may have as many."""
        return (role in (Role.UP, Role.GATE) and axis == 1) or (role is Role.DOWN and axis == 0) or role is None

    def _of_heads(self, layer: Layer, is_value: bool, heads: int) -> Tensor:
        """Rows of all heads: within each, the channels that carry most. Queries and keys keep the same ones."""
        names = (Role.VALUE,) if is_value else (Role.QUERY, Role.KEY)
        size = torch.ones(self.head[0])
        for role in names:
            size = size * self._weight(layer, role).norm(dim=1).unflatten(0, (-1, self.head[0])).square().mean(0).cpu()
        kept = _largest(size, self.head[1])
        rows: Tensor = torch.arange(heads)[:, None] * self.head[0] + kept
        return rows.flatten()

    def _of_feed_forward(self, layer: Layer) -> Tensor:
        size: Tensor = self._weight(layer, Role.UP).norm(dim=1) * self._weight(layer, Role.DOWN).norm(dim=0)
        return _largest(size, self.neurons[1])

    def _weight(self, layer: Layer, role: Role) -> Tensor:
        linear = self.teacher.get_submodule(layer.roles[role].module)
        if self.is_fused or isinstance(linear, Conv1D):
            raise SettingError(
                f"makd cannot cut the fused linears of {type(self.teacher).__name__}. Take initial='random'."
            )
        weight: Tensor = linear.get_parameter("weight").float()
        return weight


def _largest(size: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending."""
    indices: Tensor = size.topk(count).indices.cpu()
    return indices.sort().values
