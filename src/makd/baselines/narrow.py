"""Baselines: students of another hidden size than the teacher's (TinyBERT, MiniLM).

They have the teacher's number of heads, so that attention can be compared head by head, and narrower heads.
"""

import math
from typing import Literal

import torch
from transformers import PreTrainedModel

from makd.aspects import spread_layers
from makd.baselines.cut import copy_weights_
from makd.baselines.sizes import Sizes
from makd.errors import BudgetError, SettingError
from makd.ranks.budget import Budget

Initial = Literal["cut", "random"]
"""What a narrower student begins with: the teacher's weights for the channels that it keeps, or random ones."""


def narrower(
    teacher: PreTrainedModel,
    budget: Budget,
    *,
    depth: int | None = None,
    initial: Initial = "cut",
    multiple: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A student with a smaller hidden size and feed-forward, within `budget` and at most 1 % below it.

    Hidden size and feed-forward stand to each other as the teacher's do, as nearly as whole heads allow.

    Args:
        teacher: of one stack.
        budget: what the student may have.
        depth: layers; None for as many as the teacher has. They stand for those of `spread_layers`.
        initial: where its weights come from.
        multiple: of which the hidden size is; None for the number of heads, which it always is.
        seed: of random weights.

    Returns:
        A new model in eval mode, on the teacher's device and in its dtype.

    Raises:
        BudgetError: the budget is above the teacher, or no hidden size meets it.
        SettingError: `depth` is not in 1 to the teacher's; or weights cannot be cut (fused linears).
        UnsupportedModelError: the teacher's config does not say its size in the usual words.
    """
    config, sizes = teacher.config, Sizes(teacher, budget)
    count = config.num_hidden_layers
    depth = count if depth is None else depth
    if not 1 <= depth <= count:
        raise SettingError(f"A narrower student has 1 to {count} layers, as its teacher; got depth {depth}.")
    layers = spread_layers(depth, count)
    heads = config.num_attention_heads
    step = math.lcm(heads, multiple or 1)
    changes = _fit(sizes, config.hidden_size, config.intermediate_size, step, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student: PreTrainedModel = type(teacher)(sizes.config(changes, layers))
    if initial == "cut":
        return copy_weights_(student, teacher, layers)
    torch.nn.Module.to(student, device=teacher.device, dtype=teacher.dtype)
    student.eval()
    return student


def _fit(sizes: Sizes, hidden: int, feed_forward: int, step: int, layers: list[int]) -> dict[str, int]:
    """The hidden size that is a multiple of `step` with the feed-forward that fills the budget; nearest in shape."""
    best: tuple[float, dict[str, int]] | None = None
    for width in range(step, hidden + 1, step):
        neurons, is_full = sizes.fill({"hidden_size": width}, layers, feed_forward)
        if neurons < 1:
            break  # and any wider one has no room either
        oddness = abs(neurons / width - feed_forward / hidden)
        if is_full and (best is None or oddness < best[0]):
            best = oddness, {"hidden_size": width, "intermediate_size": neurons}
    if best is None:
        raise BudgetError(
            f"No hidden size up to {hidden} that is a multiple of {step} meets the budget with {len(layers)} layers. "
            "Give another budget or depth, or take a low-rank baseline."
        )
    return best[1]
