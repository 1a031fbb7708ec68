"""Station 7: what surrounds the forward and the backward of one training step, with a teacher or without."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainingArguments

from makd.distill.dropout import silent_checkpoints
from makd.distill.precision import warn_slow_bfloat16

LONGEST_WRITTEN_OUT = 128
"""Tokens of a row up to which scores are written out on a CPU in bfloat16; for longer ones torch's kernel is faster."""


@contextmanager
def training_step(
    model: nn.Module, inputs: Mapping[str, Any], arguments: TrainingArguments, dropout: bool
) -> Iterator[None]:
    """Around forward and backward: layers without dropout, and the faster of torch's attention kernels.

    In bfloat16, torch's fused attention for CPUs takes 1.8 (rows of 128 tokens) to 7 times (16) as long as plain
    products, forward and backward: docs/explanation/cost.md. Both are around both passes, since gradient checkpointing
    runs the layers again in the backward, and they have to do the same there.

    Args:
        model: the student.
        inputs: the batch, of which the longest row counts.
        arguments: the Trainer's; its device and precision.
        dropout: whether the student's dropout is on.
    """
    with ExitStack() as stack:
        if not dropout:
            stack.enter_context(silent_checkpoints(model))
        reduced = arguments.mixed_precision == "bf16" or next(model.parameters()).dtype == torch.bfloat16
        if reduced:
            warn_slow_bfloat16(arguments.device)
        if arguments.device.type == "cpu" and reduced and _longest(inputs) <= LONGEST_WRITTEN_OUT:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _longest(inputs: Mapping[str, Any]) -> int:
    """Tokens of the batch's longest row, padding counted."""
    return max((side.shape[1] for side in inputs.values() if isinstance(side, Tensor) and side.dim() > 1), default=0)
