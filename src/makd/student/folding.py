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
from makd.registry import unknown_name
from makd.student.adaptive_embedding import AdaptiveEmbedding, FactoredEmbedding
from makd.student.embedding import LowRankEmbedding, is_tied_head, untie_factors_
from makd.student.experts import FactoredStack, fold_stack_
from makd.student.hub import mark_student
from makd.student.linear import LowRankLinear
from makd.weights.sound import check_in_memory, check_numbers_of


def factored_linears(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the factored linears of `model` that can be folded, in the order of its modules.

    An LM head that is tied to factored embeddings is none: it has their factors.
    """
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear) and not is_tied_head(model, module)
    )


def _factored(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of everything factored: linears, experts, token embeddings, and the LM heads that are tied to those."""
    kinds = LowRankLinear | FactoredEmbedding | FactoredStack
    return tuple(name for name, module in model.named_modules() if isinstance(module, kinds))


@takes
def fold(student: PreTrainedModel, linears: Iterable[str] | None = None) -> PreTrainedModel:
    """A copy of `student` with factored matrices dense again: the same outputs but for rounding, more parameters.

    Args:
        student: with factored matrices; it is not changed.
        linears: names of those to fold. Token embeddings and an LM head that is tied to them are one matrix, and are
            folded together by either name. None folds all, the vocabulary too.

    Returns:
        The copy. Saved, it loads as any student; or without makd, if nothing factored is left in it and no layer was
        dropped. A dropped layer stays so: no dense layer does nothing.

    Raises:
        ModelLoadError: the factors are quantized: codes cannot be multiplied out; or not in memory.
        UnknownNameError: one of `linears` is nothing factored in `student`.
    """
    check_numbers_of(student)
    check_in_memory(student)
    folded: PreTrainedModel = copy.deepcopy(student)
    fold_(folded, linears)
    return folded


@torch.no_grad()
def fold_(student: PreTrainedModel, linears: Iterable[str] | None = None) -> None:
    """Fold in place; arguments and errors are those of `fold`."""
    check_numbers_of(student)
    known = _factored(student)
    names = known if linears is None else tuple(linears)
    for name in names:
        if name not in known:
            raise unknown_name("factored matrix", name, known)
    kept_transposed = _kept_transposed(student)
    for name in names:
        layer = student.get_submodule(name)
        if isinstance(layer, LowRankEmbedding) or is_tied_head(student, layer):
            _fold_table_(student, layer.get_parameter("weight"))
        elif isinstance(layer, AdaptiveEmbedding):
            student.set_submodule(name, _dense_embeddings(layer).train(layer.training))
        elif isinstance(layer, FactoredStack):
            fold_stack_(student, name)
        elif isinstance(layer, LowRankLinear):  # else it went with the embeddings that it was tied to
            student.set_submodule(name, _dense(layer, name in kept_transposed).train(layer.training))
    mark_student(student)


def _fold_table_(student: PreTrainedModel, table: torch.Tensor) -> None:
    """Fold the embeddings with this `table` and all LM heads that share it, which share the dense matrix after."""
    sharing = [
        (name, module)
        for name, module in student.named_modules()
        if isinstance(module, LowRankLinear | LowRankEmbedding) and module.weight is table
    ]
    weight = nn.Parameter(sharing[0][1].dense_weight(), table.requires_grad)
    for name, module in sharing:
        dense = _dense_embeddings(module) if isinstance(module, LowRankEmbedding) else _dense(module, transposed=False)
        dense.weight = weight
        student.set_submodule(name, dense.train(module.training))
    untie_factors_(student)


def _dense_embeddings(layer: FactoredEmbedding) -> nn.Module:
    with init_empty_weights():
        dense = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
    dense.weight = nn.Parameter(layer.dense_weight(), next(layer.parameters()).requires_grad)
    return dense


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
