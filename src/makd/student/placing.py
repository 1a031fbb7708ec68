"""How an empty model gets a student's modules, before its weights are read."""

from collections.abc import Iterable, Mapping, Sequence
from types import UnionType

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from makd.anatomy import SkippedLayer, linear_shape
from makd.anatomy.experts import read_stacks
from makd.errors import ModelLoadError
from makd.solvers.stacks import Side
from makd.student.adaptive_embedding import AdaptiveEmbedding
from makd.student.config import Bands, StudentConfig
from makd.student.embedding import LowRankEmbedding, rename_ties_, tied_head_names
from makd.student.experts import FactoredStack, highest_rank, place_stack_
from makd.student.linear import LowRankLinear
from makd.student.shared_linear import lead_


def place_stand_ins_(model: PreTrainedModel, config: StudentConfig) -> None:
    """Put empty stand-ins where `config` says so; call under `torch.device("meta")`, and no memory is taken.

    Parts that `model` does not have (a T5 encoder has no decoder) are left out.

    Raises:
        ModelLoadError: config and model do not fit together.
    """
    for name, outputs in config.dropped.items():
        found = find_module_name(model, name, nn.Module)
        if found is not None:
            model.set_submodule(found, SkippedLayer.in_place_of(model.get_submodule(found), outputs))
    following = {other for others in config.shared.values() for other in others}
    for name, rank in config.ranks.items():
        found = None if name in following else find_module_name(model, name)
        if found is not None:
            _factor_linear_(model, found, rank, config.shared.get(name, ()))
    for name, entry in config.experts.items():
        _factor_stack_(model, name, int(entry["rank"]), entry["shared"])  # type: ignore[arg-type]
    for name, ranks in config.embeddings.items():
        found = find_module_name(model, name, nn.Embedding)
        if found is None:
            continue
        if isinstance(ranks, int):
            _factor_embeddings_(model, found, ranks)
        else:
            _place_bands_(model, found, ranks)
    rename_ties_(model)


def place_empty_(
    model: PreTrainedModel, ranks: Mapping[str, int | None], shared: Iterable[tuple[str, ...]] = ()
) -> None:
    """Put empty factored linears in the place of dense ones, where there is a rank and they are not there yet.

    Args:
        model: whose weights are on the meta device.
        ranks: linear -> rank; None where it stays as it is.
        shared: linears that get one A.
    """
    following = {linears[0]: linears[1:] for linears in shared}
    inside = {name for others in following.values() for name in others}
    for name, rank in ranks.items():
        linear = model.get_submodule(name)
        if rank is not None and name not in inside and not isinstance(linear, LowRankLinear):
            dtype = linear.get_parameter("weight").dtype
            with torch.device("meta"):
                _factor_linear_(model, name, rank, following.get(name, ()))
            for placed in (name, *following.get(name, ())):
                model.get_submodule(placed).to(dtype)


def _factor_linear_(model: PreTrainedModel, name: str, rank: int, others: Sequence[str] = ()) -> None:
    """Put an empty factored linear in the place of a dense one, and of others (saved names) that share its A."""
    linear = model.get_submodule(name)
    out_features, in_features = linear_shape(linear)
    highest = in_features if others else min(in_features, out_features)
    if rank > highest:
        raise ModelLoadError(
            f"config.json gives {name!r} rank {rank}; it is a matrix of {out_features} x {in_features}, so {highest} "
            "at most. The config and the model do not fit together."
        )
    has_bias = getattr(linear, "bias", None) is not None
    leader = LowRankLinear(in_features, out_features, rank, has_bias, shared=bool(others))
    model.set_submodule(name, leader)
    if others:
        found = [find_module_name(model, other) or other for other in others]
        dense = [model.get_submodule(other) for other in found]
        biases = [getattr(other, "bias", None) is not None for other in dense]
        followers = lead_(leader, [linear_shape(other)[0] for other in dense], biases)
        for other, follower in zip(found, followers, strict=True):
            model.set_submodule(other, follower)


def _factor_stack_(model: PreTrainedModel, name: str, rank: int, shared: Side) -> None:
    """Put empty factors in the place of a stack of experts' matrices."""
    owner = find_module_name(model, name.rpartition(".")[0], nn.Module)
    if owner is None:
        return
    stacks = read_stacks(owner, 0, model.get_submodule(owner))
    stack = next((stack for stack in stacks if stack.leaf == name.rpartition(".")[2]), None)
    if stack is None or rank > highest_rank(stack.out_features, stack.in_features, shared):
        raise ModelLoadError(
            f"config.json gives {name!r} rank {rank}, which {type(model).__name__} has no experts for. The config and "
            "the model do not fit together."
        )
    dtype = model.get_submodule(owner).get_parameter(stack.leaf).dtype
    factored = FactoredStack(stack.experts, stack.out_features, stack.in_features, rank, shared, dtype=dtype)
    place_stack_(model, stack, factored)


def _factor_embeddings_(model: PreTrainedModel, name: str, rank: int) -> None:
    dense = model.get_submodule(name)
    assert isinstance(dense, nn.Embedding)
    if rank > min(dense.num_embeddings, dense.embedding_dim):
        raise ModelLoadError(
            f"config.json gives {name!r} rank {rank}; it is a matrix of {dense.num_embeddings} x "
            f"{dense.embedding_dim}. The config and the model do not fit together."
        )
    heads = tied_head_names(model, name)
    model.set_submodule(name, LowRankEmbedding(dense.num_embeddings, dense.embedding_dim, rank, dense.padding_idx))
    for head in heads:
        _factor_linear_(model, head, rank)


def _place_bands_(model: PreTrainedModel, name: str, bands: Bands) -> None:
    dense, rows, ranks = model.get_submodule(name), [int(count or 0) for count in bands["rows"]], bands["ranks"]
    assert isinstance(dense, nn.Embedding)
    shape, highest = (dense.num_embeddings, dense.embedding_dim), [min(count, dense.embedding_dim) for count in rows]
    if sum(rows) != shape[0] or any((rank or 1) > high for rank, high in zip(ranks, highest, strict=True)):
        raise ModelLoadError(
            f"config.json gives {name!r} bands of {rows} rows and ranks {list(ranks)}; it is a matrix of {shape[0]} x "
            f"{shape[1]}. The config and the model do not fit together."
        )
    heads = tied_head_names(model, name)
    if heads:
        raise ModelLoadError(
            f"{heads[0]} of {type(model).__name__} has the weights of {name}, which are in bands of several ranks "
            "here, and no head can share those. Load it under the class it was made with, or make it dense first: "
            "`makd.fold(student)`."
        )
    model.set_submodule(name, AdaptiveEmbedding(shape[1], rows, ranks, dense.padding_idx))


def find_module_name(
    model: PreTrainedModel, saved_name: str, kind: type | UnionType = nn.Linear | Conv1D | LowRankLinear
) -> str | None:
    """The name that a module called `saved_name` in the saved model has in `model`, perhaps under another head.

    Under a head, names gain the base model's prefix; without one they lose it. None when `model` does not have that
    part at all (a T5 encoder has no decoder, a base model no LM head).

    Args:
        model: with the architecture's own modules.
        saved_name: of a module in the model that was saved.
        kind: what the module is.

    Raises:
        ModelLoadError: the part is there, but not the module.
    """
    prefix = f"{model.base_model_prefix}."
    names = dict(model.named_modules())
    candidates = (saved_name, prefix + saved_name, saved_name.removeprefix(prefix))
    for candidate in candidates:
        if isinstance(names.get(candidate), kind):
            return candidate
    for candidate in candidates:
        if candidate.split(".")[0] + "." != prefix and candidate.split(".")[0] in names:
            raise ModelLoadError(
                f"config.json says that {saved_name!r} is factored or dropped, but {type(model).__name__} has no such "
                f"{'linear' if kind == nn.Linear | Conv1D | LowRankLinear else 'module'}. The config and the model "
                "class do not fit together."
            )
    return None
