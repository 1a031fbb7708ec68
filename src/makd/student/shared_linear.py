"""Linears that read the same input and share one A: y_q = B_q (A x), y_k = B_k (A x), y_v = B_v (A x).

The first of them holds A, as any factored linear does; the others (`FollowingLinear`) have a B alone and look A up in
the first. So A is one parameter of the model, under one name, in one place of a checkpoint, and whatever replaces,
moves or trains it does so for all. The product A x is computed by whichever of them is called first, and handed on.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from makd.anatomy import StandIn, linear_shape
from makd.solvers.factors import Factors
from makd.student.linear import LowRankLinear, dense_weight
from makd.student.shared_product import SharedProduct


class FollowingLinear(LowRankLinear):
    """A factored linear that has no A of its own: it takes that of `leader`, the first linear of its group.

    `reduce` is the leader's; `rank` may be above `out_features`.
    """

    def __init__(
        self,
        leader: LowRankLinear,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """B with nn.Linear's random start."""
        StandIn.__init__(self)
        self.in_features = leader.in_features
        self.out_features = out_features
        self.rank = leader.rank
        self.expand = nn.Linear(leader.rank, out_features, bias=bias, device=device, dtype=dtype)
        self.shared = leader.shared
        self._leader = (leader,)  # in a tuple, or it would become a part of this module, and A a second parameter

    @property
    def leader(self) -> LowRankLinear:
        """The linear that holds A."""
        return self._leader[0]

    @property
    def reduce(self) -> nn.Module:  # type: ignore[override]
        """A, as the leader has it."""
        return self.leader.reduce

    def _replicate_for_data_parallel(self) -> "FollowingLinear":
        raise RuntimeError(
            "nn.DataParallel cannot copy linears that share one A. Start one process for each device instead "
            "(torchrun, accelerate launch), or factorize with share_input never."
        )


def lead_(leader: LowRankLinear, out_features: Sequence[int], biases: Sequence[bool]) -> list[FollowingLinear]:
    """Linears with these outputs that share the A of `leader`, with a random B, on its device and in its dtype."""
    leader.shared = SharedProduct(1 + len(out_features))
    weight = leader.expand.weight
    return [
        FollowingLinear(leader, features, bias, weight.device, weight.dtype)
        for features, bias in zip(out_features, biases, strict=True)
    ]


def stacked_linear(linears: Sequence[nn.Module]) -> nn.Linear:
    """One dense linear that gives the outputs of several, one after the other; all have a bias, or none has."""
    weight = torch.cat([dense_weight(linear) for linear in linears])
    biases = [bias.detach() for linear in linears if (bias := getattr(linear, "bias", None)) is not None]
    stacked = nn.Linear(weight.shape[1], len(weight), bool(biases), device="meta")
    stacked.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        stacked.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return stacked


@torch.no_grad()
def share_linears_(model: nn.Module, names: Sequence[str], factors: Factors) -> dict[str, Factors]:
    """Put factors with one A in the place of the linears `names` of `model`, which keep their biases.

    Args:
        model: changed in place.
        names: of linears that read the same input.
        factors: `expand` is the linears' B, one below the other. If the solver refitted the bias, so is that.

    Returns:
        Each linear's part of the factors; its error is that of the group.
    """
    linears = [model.get_submodule(name) for name in names]
    sizes = [linear_shape(linear)[0] for linear in linears]
    refitted = [None] * len(sizes) if factors.bias is None else list(factors.bias.split(sizes))
    parts = [
        replace(factors, expand=expand, bias=bias)
        for expand, bias in zip(factors.expand.split(sizes), refitted, strict=True)
    ]
    biases = [part.bias if part.bias is not None else getattr(linear, "bias", None)
              for part, linear in zip(parts, linears, strict=True)]  # fmt: skip
    leader = LowRankLinear.from_factors(parts[0], biases[0], shared=True)
    members = [leader, *lead_(leader, sizes[1:], [bias is not None for bias in biases[1:]])]
    for name, member, part, bias in zip(names, members, parts, biases, strict=True):
        member.expand.weight.copy_(part.expand)
        if bias is not None:
            member.expand.bias.copy_(bias)
        model.set_submodule(name, member.eval())
    return dict(zip(names, parts, strict=True))


def replace_linears_(model: nn.Module, names: Sequence[str], factors: Factors) -> None:
    """Put factors in the place of a linear, or of several that share one A; biases stay unless they were refitted."""
    if len(names) > 1:
        share_linears_(model, names, factors)
        return
    bias = getattr(model.get_submodule(names[0]), "bias", None)
    layer = LowRankLinear.from_factors(factors, None if bias is None else bias.detach())
    model.set_submodule(names[0], layer.eval())


def settle_groups_(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of each linear that holds an A for others -> the names of those, in the order of `model`.

    A linear whose leader was replaced (by a dense one, say) keeps its A alive, but no longer has it in the model: the
    first such linear of a group becomes the leader, and nothing is lost when the model is saved.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    groups: dict[LowRankLinear, list[FollowingLinear]] = {}
    for module in names:
        if isinstance(module, FollowingLinear):
            groups.setdefault(module.leader, []).append(module)
    found = {}
    for leader, followers in groups.items():
        if leader not in names:
            leader, followers = _succeed_(model, names, leader, followers)
        elif len(followers) + 1 != getattr(leader.shared, "members", 0):
            _join_(leader, followers)
        if followers:
            found[names[leader]] = tuple(names[follower] for follower in followers)
    return found


def _succeed_(
    model: nn.Module, names: dict[LowRankLinear, str], lost: LowRankLinear, followers: list[FollowingLinear]
) -> tuple[LowRankLinear, list[FollowingLinear]]:
    """Make the first of the followers hold the A of a leader that is no longer in the model."""
    first, *others = followers
    leader = LowRankLinear(lost.in_features, first.out_features, lost.rank, first.bias is not None, "meta", shared=True)
    leader.reduce, leader.expand = lost.reduce, first.expand
    leader.train(first.training)
    names[leader] = names[first]
    model.set_submodule(names[first], leader)
    _join_(leader, others)
    return leader, others


def _join_(leader: LowRankLinear, followers: Sequence[FollowingLinear]) -> None:
    """Make these, and no others, a group."""
    leader.shared = SharedProduct(1 + len(followers)) if followers else None
    for follower in followers:
        follower._leader, follower.shared = (leader,), leader.shared
