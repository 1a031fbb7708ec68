"""Station 3, backwards: factors multiplied out again, where a dense linear is faster.

Factors of a high rank, or for few tokens, can be slower than the matrix they stand for: two small products use the
machine less well than a large one. A folded linear is what the architecture has in its place, and loads as such.
"""

import copy
from collections.abc import Iterable

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from makd.kinds import takes
from makd.lowrank.embedding import is_tied_head
from makd.lowrank.hub import mark_student
from makd.lowrank.linear import LowRankLinear
from makd.registry import unknown_name


def factored_linears(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the factored linears of `model` that can be folded, in the order of its modules.

    An LM head that is tied to factored embeddings is none: it has their factors.
    """
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear) and not is_tied_head(model, module)
    )


@takes
def fold(student: PreTrainedModel, linears: Iterable[str] | None = None) -> PreTrainedModel:
    """A copy of `student` with factored linears dense again: the same outputs but for rounding, more parameters.

    Args:
        student: with factored linears; it is not changed.
        linears: names of those to fold; None folds all (`factored_linears`).

    Returns:
        The copy. Saved, it loads as any student, or without makd if nothing factored is left in it.

    Raises:
        UnknownNameError: one of `linears` is not a factored linear of `student`.
    """
    folded: PreTrainedModel = copy.deepcopy(student)
    fold_(folded, linears)
    return folded


@torch.no_grad()
def fold_(student: PreTrainedModel, linears: Iterable[str] | None = None) -> None:
    """Fold in place; arguments and errors are those of `fold`."""
    known = factored_linears(student)
    names = known if linears is None else tuple(linears)
    for name in names:
        if name not in known:
            raise unknown_name("factored linear", name, known)
    kept_transposed = _kept_transposed(student)
    for name in names:
        layer = student.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        student.set_submodule(name, _dense(layer, name in kept_transposed).train(layer.training))
    mark_student(student)


def added_parameters(student: PreTrainedModel, linears: Iterable[str]) -> int:
    """How many parameters more the student has with `linears` folded."""
    names = set(linears)
    factored = {name: module for name, module in student.named_modules() if isinstance(module, LowRankLinear)}
    users: dict[nn.Module, set[str]] = {}
    for name, module in factored.items():
        users.setdefault(module.reduce, set()).add(name)
    layers = [factored[name] for name in names if name in factored]
    added = sum(layer.in_features * layer.out_features - layer.rank * layer.out_features for layer in layers)
    # an A that others share goes with the last of them
    return added - sum(reduce.get_parameter("weight").numel() for reduce, who in users.items() if who <= names)


def _dense(layer: LowRankLinear, transposed: bool) -> nn.Module:
    weight = layer.dense_weight()
    dense: nn.Module
    with init_empty_weights():
        if transposed:
            dense = Conv1D(layer.out_features, layer.in_features)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dense.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, layer.weight.requires_grad)
    if layer.bias is not None:
        dense.bias = layer.bias  # the parameter itself: BERT's predictions hold the head's bias too
    return dense


def _kept_transposed(student: PreTrainedModel) -> frozenset[str]:
    """Linears that the architecture builds as Conv1D, whose weight stands the other way round (GPT-2)."""
    config = copy.deepcopy(student.config)
    config.__dict__.pop("quantization_config", None)
    with init_empty_weights():
        plain = type(student)(config)
    return frozenset(name for name, module in plain.named_modules() if isinstance(module, Conv1D))
