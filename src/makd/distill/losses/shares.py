"""Station 7: what part of an optimizer step a batch is, so that a step's loss is a mean over all its tokens.

A step may be one batch or several, accumulated one after the other, or read at once by as many processes. Were each
batch's mean weighed alike, the update would depend on how the rows are split: a batch of few tokens would count for as
much as one of many. So every mean of every batch is weighed by the share of the step's tokens that it is over.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from makd.anatomy import Anatomy
from makd.aspects import ActivePlan
from makd.devices import widest_dtype
from makd.distill.losses.counted import LossKey, count, loss_keys
from makd.processes import started as processes

One = TypeVar("One")
SHARE = "share"
"""Entry of a batch: what part of its optimizer step it is; of a plan, `Shares`."""

Shares = Mapping[LossKey, float]
"""By mean: what part of the step's tokens a batch has, in [0, 1]; over all batches they add up to 1."""


class _Whole(dict[LossKey, float]):
    def __missing__(self, mean: LossKey) -> float:
        return 1.0


WHOLE: Shares = _Whole()
"""Of a batch that is all there is."""


def add_up(values: Tensor) -> Tensor:
    """The sum over all processes of what each of them has, in place."""
    if processes.process_count() > 1:
        torch.distributed.all_reduce(values)
    return values


def own_places(batches: int) -> range:
    """Where this process's batches stand among those of all: each has one, then each its next."""
    return range(processes.process_index(), batches * processes.process_count(), processes.process_count())


def in_order(own: Sequence[One]) -> list[One]:
    """What each batch of a step has, of all processes, in the order of `own_places`. Every process calls it."""
    if processes.process_count() == 1:
        return list(own)
    gathered: list[Any] = [None] * processes.process_count()
    torch.distributed.all_gather_object(gathered, list(own))
    return [one for together in zip(*gathered, strict=True) for one in together]


def step_shares(counts: Tensor) -> list[list[float]]:
    """Each batch's share of what all batches of an optimizer step count, those of other processes too.

    Every process calls it at the same time.

    Args:
        counts: (batches, means), of this process's; on a device where sums over processes can be made.
    """
    totals = add_up(counts.sum(0)).tolist()
    return [
        [mine / total if total else 0.0 for mine, total in zip(row, totals, strict=True)] for row in counts.tolist()
    ]


def shares_of(
    plan: ActivePlan, anatomy: Anatomy, batches: Sequence[Mapping[str, Any]], device: torch.device
) -> list[Shares]:
    """`step_shares` for the means of a plan.

    Args:
        plan: aspects.
        anatomy: of the student.
        batches: this process's, of one optimizer step.
        device: where sums over processes are made.
    """
    counts = torch.stack([count_vector(plan, anatomy, batch, device) for batch in batches])
    return [dict(zip(loss_keys(plan), row, strict=True)) for row in step_shares(counts)]


def count_vector(plan: ActivePlan, anatomy: Anatomy, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """What each mean is over in a batch, in the order of `loss_keys`, as float64 (float32 where a device has none)."""
    found = count(plan, anatomy, batch)
    wide = widest_dtype(device)
    return torch.stack([torch.as_tensor(found[mean], device=device).to(wide) for mean in loss_keys(plan)])


def terms_of(plan: ActivePlan) -> dict[str, tuple[LossKey, ...]]:
    """Name of each term -> the means that its loss is the mean of."""
    return {active.name: active.comparisons or (active.name,) for active in plan.terms}


class RunningMeans:
    """Means of losses over all batches and processes since they were last taken."""

    def __init__(self, terms: Mapping[str, Sequence[LossKey]]) -> None:
        """Nothing is added yet; `terms` is what `terms_of` gives."""
        self.terms = terms
        self.means = tuple(dict.fromkeys(mean for parts in terms.values() for mean in parts))
        self._sums: Tensor | None = None

    def add(self, losses: Mapping[LossKey, Tensor], weights: Mapping[LossKey, float]) -> None:
        """Add what a batch has lost, on its device: reading a value would make an accelerator wait.

        Args:
            losses: each alone, unweighted; a mean that a batch says nothing about may be absent.
            weights: what each counts for: a share of a step, or a number of tokens.
        """
        device = next(iter(losses.values())).device if losses else torch.device("cpu")
        zero = torch.zeros((), device=device)
        values = torch.stack([losses.get(mean, zero).detach().float() for mean in self.means])
        factors = torch.tensor([weights[mean] if mean in losses else 0.0 for mean in self.means], device=device)
        new = torch.stack([values * factors, factors])
        self._sums = new if self._sums is None else self._sums + new

    def take(self, device: torch.device) -> dict[str, float]:
        """The mean of each term since the last call, over all processes, each of which has to call it.

        A term whose comparisons count nothing anywhere is left out.
        """
        own = torch.zeros(2, len(self.means)) if self._sums is None else self._sums
        sums, counts = add_up(own.to(device)).tolist()
        self._sums = None
        by_mean = {mean: total / n for mean, total, n in zip(self.means, sums, counts, strict=True) if n > 0}
        found: dict[str, float] = {}
        for name, wanted in self.terms.items():
            parts = [by_mean[mean] for mean in wanted if mean in by_mean]
            if parts:
                found[name] = sum(parts) / len(parts)
        return found
