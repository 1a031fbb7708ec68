"""Baselines: how large a dense student may be: its config, found by counting models that hold no weights.

A budget means for a dense student what it means for a low-rank one: `keep_linears` is a share of the linears inside the
layers, `keep` and `params` are of the whole model.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, count_experts, resolve
from makd.errors import BudgetError, UnsupportedModelError
from makd.ranks.budget import Budget

FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
"""Settings that a config has to have. Most encoders and decoders do."""

TOLERANCE = 0.01
"""Share of the budget that a dense student may leave unused."""


def count_linears(model: PreTrainedModel, anatomy: Anatomy) -> int:
    """Parameters of the linears inside the layers, weights and biases, each once; routed experts are linears too."""
    linears = {id(p): p.numel() for name in anatomy.linears for p in model.get_submodule(name).parameters()}
    return sum(linears.values()) + count_experts(model, anatomy)


class Sizes:
    """What students of a teacher would have, against what a budget allows."""

    def __init__(self, teacher: PreTrainedModel, budget: Budget) -> None:
        """Count the teacher.

        Raises:
            UnsupportedModelError: its config does not say its size in the usual words, or it has two stacks.
            BudgetError: the budget is above the teacher.
        """
        self.teacher, self.of_linears = teacher, budget.keep_linears is not None
        missing = [name for name in FIELDS if not hasattr(teacher.config, name)]
        if missing or teacher.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"Dense students are made of models with one stack whose config has {', '.join(FIELDS)}; that of "
                f"{type(teacher).__name__} lacks {', '.join(missing) or 'nothing, but it has two stacks'}. "
                "Take a low-rank baseline."
            )
        total, linears = teacher.num_parameters(), count_linears(teacher, resolve(teacher))
        limit = budget.limit(total, linears)
        if limit > total:
            raise BudgetError(f"A budget of {limit:,} parameters is above the teacher, which has {total:,}.")
        self.limit = limit - (total - linears) if self.of_linears else limit

    def config(self, changes: Mapping[str, int], layers: Iterable[int] | None = None) -> Any:
        """The teacher's config with `changes`; `layers` are those of the teacher that the student's stand for."""
        config = copy.deepcopy(self.teacher.config)
        if layers is not None:
            chosen = list(layers)
            config.num_hidden_layers = len(chosen)
            if getattr(config, "layer_types", None):
                config.layer_types = [self.teacher.config.layer_types[index] for index in chosen]
        for name, value in changes.items():
            setattr(config, name, value)
        if "hidden_size" in changes and getattr(config, "head_dim", None) is not None:
            scale = changes["hidden_size"] / self.teacher.config.hidden_size
            config.head_dim = round(self.teacher.config.head_dim * scale)
        return config

    def count(self, config: Any) -> int:
        """Parameters of a student with this config, of the kind that the budget is about."""
        with torch.device("meta"):
            model: PreTrainedModel = type(self.teacher)(config)
        return count_linears(model, resolve(model)) if self.of_linears else model.num_parameters()

    def fill(self, changes: Mapping[str, int], layers: Iterable[int], widest: int) -> tuple[int, bool]:
        """The largest `intermediate_size` within the budget, and whether the budget is then filled.

        Parameters grow by the same number with each neuron, so two counts say it all.

        Args:
            changes: to the teacher's config.
            layers: the teacher's that the student's stand for.
            widest: what the size may be at most.

        Returns:
            The size, below 1 where nothing fits; whether at most `TOLERANCE` of the budget is left.
        """
        chosen = list(layers)
        one, two = (self.count(self.config({**changes, "intermediate_size": size}, chosen)) for size in (1, 2))
        neurons = min(1 + (self.limit - one) // (two - one), widest)
        return neurons, one + (neurons - 1) * (two - one) >= (1 - TOLERANCE) * self.limit
