"""Station 7: which numbers a student learns in. Steps are far smaller than the distance between numbers of 16 bits.

At a weight of 0.1 the next bfloat16 is 0.0005 away and a step of Adam's is the learning rate, such as 0.0001: it is
rounded away. In float16 the squares of small gradients are 0, and Adam divides by them. So parameters that learn are in
float32; products may be in bfloat16, by autocast.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from makd.errors import SettingError

logger = logging.getLogger(__name__)

NARROW = (torch.float16, torch.bfloat16)

SLOW = 1.5
"""How many times as long as in float32 a product in bfloat16 has to take for a user to be told."""


@contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """Inside the block the parameters of `model` are in float32; after it, rounded to the dtype that they had."""
    before = {parameter: parameter.dtype for parameter in model.parameters() if parameter.dtype in NARROW}
    for parameter in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before.items():
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None


def check_precision(model: nn.Module) -> None:
    """Refuse a `model` whose learning parameters cannot learn in their dtype.

    Raises:
        SettingError: some are in float16. Of those in bfloat16 a warning is logged: some optimizers round so that they
            can learn.
    """
    learning = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    advice = (
        "Give it `model.float()` and train with TrainingArguments(bf16=True), which makes its products in bfloat16; "
        "round the result after."
    )
    if torch.float16 in learning:
        raise SettingError(
            f"A {type(model).__name__} with parameters in float16 cannot learn: training ruins it. {advice}"
        )
    if torch.bfloat16 in learning:
        logger.warning(
            "The %s has parameters in bfloat16: most steps are smaller than what they round to, and it learns about "
            "half as much. %s",
            type(model).__name__,
            advice,
        )


def warn_slow_bfloat16(device: torch.device) -> None:
    """Warn, once a process, if products in bfloat16 cost time on this machine instead of saving it."""
    if device.type != "cpu":
        return
    ratio = bfloat16_ratio()
    if ratio > SLOW:
        _warn(ratio)


@cache
def bfloat16_ratio() -> float:
    """Seconds of a product in bfloat16 over those in float32 on this machine's CPU.

    One without instructions for bfloat16 (AVX-512 BF16, AMX, those of Arm) takes up to ten times as long.
    """
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The quickest of a few products: other work on the machine can only make one slower."""
    values, taken = torch.ones(256, 256, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        nn.functional.linear(values, values)
        taken.append(time.perf_counter() - start)
    return min(taken)


@cache
def _warn(ratio: float) -> None:
    logger.warning(
        "On this processor a product in bfloat16 takes %.1f times as long as in float32. Unless memory is short, take "
        "float32 (training.precision, layerwise.precision, dtype).",
        ratio,
    )
