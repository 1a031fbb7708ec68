"""The token embeddings of a student whose vocabulary is factored, and how an LM head shares both factors with them.

Stands beside `linear`: `vocabulary` makes the factors, `hub` saves and loads the layer.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import StandIn, is_adapted
from makd.student.linear import LowRankLinear, used_twice

TABLES = (".expand.weight", ".table.weight")
"""How the names of the factors with a row for each token end: an LM head's, and the embeddings'."""


class Directions(nn.Module):
    """The factor (rank, d) of a factored vocabulary that tokens are made of.

    No linear, though a tied head applies it as one: what looks for linears (quantizers, adapters) leaves it alone. The
    product is made in a call, since what offloads a model fetches the weights of a module when that is called.
    """

    def __init__(
        self,
        embedding_dim: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """With nn.Linear's random start."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty((rank, embedding_dim), device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, rows: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch dim"]:
        """Sums of directions."""
        return rows @ self.weight


class LowRankEmbedding(StandIn):
    """A token's embedding as a sum of `rank` directions: E ~ table @ directions, (V, rank) times (rank, d).

    It has rank · (V + d) weights, fewer than E as long as rank < V · d / (V + d), which is nearly d. A tied LM head
    reads the same two matrices the other way: logits = table (directions x).
    """

    tied = False
    """Whether an LM head has the same factors."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Factors with torch's random start.

        Raises:
            ValueError: `rank` is not in 1..min(num_embeddings, embedding_dim).
        """
        super().__init__()
        if not 1 <= rank <= min(num_embeddings, embedding_dim):
            raise ValueError(
                f"rank is in 1..{min(num_embeddings, embedding_dim)} for {num_embeddings} embeddings of "
                f"{embedding_dim}; got {rank}."
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.rank = rank
        self.padding_idx = padding_idx
        self.table = nn.Embedding(num_embeddings, rank, padding_idx, device=device, dtype=dtype)
        self.directions = Directions(embedding_dim, rank, device, dtype)

    @property
    def weight(self) -> Tensor:
        """The factor with a row for each token: for code that reads dtype, device or the vocabulary's size off it."""
        return self.table.weight

    def dense_weight(self) -> Float[Tensor, "vocabulary dim"]:
        """The embeddings that the factors stand for."""
        return self.table.weight @ self.directions.weight

    def __setattr__(self, name: str, value: Any) -> None:
        """A module's, which peft uses to put an adapter where a factor was.

        Raises:
            UnsupportedModelError: an LM head has that factor too.
        """
        if self.tied and is_adapted(value):
            raise used_twice()
        super().__setattr__(name, value)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Embeddings of token ids."""
        output: Tensor = self.directions(self.table(ids))
        return output

    def extra_repr(self) -> str:
        """What `print(model)` says of it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


def is_tied_head(model: nn.Module, linear: nn.Module) -> bool:
    """Whether the factored `linear` is an LM head that shares its factors with factored embeddings of `model`."""
    return isinstance(linear, LowRankLinear) and any(
        linear.expand.weight is module.table.weight
        for module in model.modules()
        if isinstance(module, LowRankEmbedding)
    )


def tied_head_names(model: PreTrainedModel, embedding: str) -> list[str]:
    """Linears whose weight transformers ties to the embeddings called `embedding`, by the model's own rules."""
    ties: Mapping[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    names = [target.removesuffix(".weight") for target, source in ties.items() if source == f"{embedding}.weight"]
    return [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]


def rename_ties_(model: PreTrainedModel) -> None:
    """Make transformers tie factors with factors, after embeddings or head of `model` were replaced.

    `_tied_weights_keys` of a model class says `lm_head.weight` is `embed_tokens.weight`; neither exists any more. The
    names in it are replaced on this instance, where `tie_weights`, saving and loading look them up.
    """
    if not any(isinstance(module, LowRankEmbedding) for module in model.modules()):
        return
    for module in model.modules():
        ties = getattr(module, "_tied_weights_keys", None)
        if isinstance(module, PreTrainedModel) and isinstance(ties, Mapping):
            renamed: dict[str, str] = {}
            for target, source in ties.items():
                ours, theirs = _factor_names(module, target), _factor_names(module, source)
                if len(ours) == len(theirs):  # else one of them stayed dense, and they are no longer one
                    renamed.update(zip(ours, theirs, strict=True))
            module.__dict__.setdefault("_dense_ties", ties)
            module._tied_weights_keys = renamed
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
    _note_ties_(model)


def _note_ties_(model: PreTrainedModel) -> None:
    """Tell embeddings and heads that share factors so."""
    for pair in model.all_tied_weights_keys.items():
        modules = [model.get_submodule(name.rsplit(".", 2)[0]) for name in pair if name.endswith(TABLES)]
        if len(modules) == 2:
            for module in modules:
                module.tied = True  # type: ignore[assignment]


def untie_factors_(model: PreTrainedModel) -> None:
    """Undo `rename_ties_`, after factored embeddings of `model` were made dense: they are tied by the model's rules."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module._tied_weights_keys = module.__dict__.pop("_dense_ties", module._tied_weights_keys)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
    rename_ties_(model)  # of others that are left


def _factor_names(model: nn.Module, name: str) -> list[str]:
    """Where a parameter called `name` in the dense model is now: two factors, or itself."""
    parent, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:  # a pattern, or a part that this model does not have
        return [name]
    if isinstance(module, LowRankEmbedding) and leaf == "weight":
        return [f"{parent}.table.weight", f"{parent}.directions.weight"]
    if isinstance(module, LowRankLinear) and leaf == "weight":
        return [f"{parent}.expand.weight", f"{parent}.reduce.weight"]
    return [f"{parent}.expand.bias"] if isinstance(module, LowRankLinear) else [name]
