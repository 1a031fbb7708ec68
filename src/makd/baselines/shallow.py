"""Baselines: students with fewer of the teacher's layers and all of its hidden size (DistilBERT, PKD, ShortGPT).

Whole layers rarely meet a budget, so the student has as many as are needed and a narrower feed-forward in each: its
neurons are those of the teacher's that carry most. At half of the linears of an even number of layers none is cut.
"""

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedModel

from makd.aspects import spread_layers
from makd.baselines.cut import copy_weights_
from makd.baselines.sizes import Sizes
from makd.errors import BudgetError
from makd.ranks.budget import Budget

Start = Literal["spread", "first"]
"""Which of the teacher's layers a shallow student begins with: those that it will mimic, or the first ones."""


def fewer_layers(teacher: PreTrainedModel, budget: Budget, start: Start | Sequence[int] = "spread") -> PreTrainedModel:
    """A student with some of the teacher's layers, within `budget` and at most 1 % (or a neuron a layer) below it.

    It has the fewest layers that can fill the budget: what they have above it is taken from the feed-forward.

    Args:
        teacher: of one stack.
        budget: what the student may have.
        start: `spread` takes the layers of `spread_layers` (of twice as many: every second one), `first` the first; or
            all layers, in the order in which to keep them.

    Returns:
        A copy in eval mode, on the teacher's device and in its dtype.

    Raises:
        BudgetError: the budget is above the teacher, or one layer without a feed-forward does not fit.
        UnsupportedModelError: the teacher's config does not say its size in the usual words.
    """
    sizes, count = Sizes(teacher, budget), teacher.config.num_hidden_layers
    kept: tuple[int, list[int]] | None = None
    for depth in range(1, count + 1):
        if start == "spread":
            layers = spread_layers(depth, count)
        else:
            layers = list(range(depth)) if start == "first" else sorted(start[:depth])
        neurons, is_full = sizes.fill({}, layers, teacher.config.intermediate_size)
        if neurons < 1:
            break
        kept = neurons, layers
        if is_full:
            break
    if kept is None:
        raise BudgetError(
            "The budget is below one layer of the teacher with a feed-forward of 1 neuron. Give a larger one, or take "
            "a low-rank baseline."
        )
    student: PreTrainedModel = type(teacher)(sizes.config({"intermediate_size": kept[0]}, kept[1]))
    return copy_weights_(student, teacher, kept[1])
