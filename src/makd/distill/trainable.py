"""Station 7: which parameters of a student learn: all, its linears', or adapters on its factors.

Adapters are peft's LoRA (Hu et al., arXiv 2106.09685): they cost little memory while they learn, and are merged into
the factors afterwards, so that the student is as small as it was.
"""

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from makd.anatomy import StandIn, resolve
from makd.distill.training import TrainingConfig
from makd.errors import SettingError
from makd.student.adapters import factor_names

logger = logging.getLogger(__name__)


@contextmanager
def learning(model: PreTrainedModel, training: TrainingConfig, seed: int, stage: int = 1) -> Iterator[None]:
    """Inside, what `training.trainable` names learns, and only that; afterwards, after an error too, everything may.

    Adapters are merged at the end, and thrown away after an error.

    Args:
        model: that learns.
        training: names what of it does.
        seed: of adapters: they are the same whatever was drawn before them, and torch's random state is left as it is.
        stage: number of the training among those that follow each other: each draws others.

    Raises:
        SettingError: adapters are asked for, and peft is not installed, or the model has no factors.
    """
    try:
        if training.trainable == "adapters":
            with _adapted(model, training, [seed, stage]):
                yield
        else:
            model.requires_grad_(training.trainable == "all")
            if training.trainable == "linears":
                anatomy = resolve(model)
                for name in (*anatomy.linears, *(stack.module for stack in anatomy.stacks)):
                    model.get_submodule(name).requires_grad_(True)
            yield
    finally:
        model.requires_grad_(True)


@contextmanager
def _adapted(model: PreTrainedModel, training: TrainingConfig, seeds: Sequence[int]) -> Iterator[None]:
    """Inside, adapters learn and nothing else; they are merged at the end, and thrown away after an error."""
    check_adapters(training, model)
    tuner = _adapt_(model, training.adapter_rank, seeds)
    try:
        yield
    except BaseException:
        tuner.unload()
        raise
    tuner.merge_and_unload(safe_merge=True)


def check_adapters(training: TrainingConfig, model: PreTrainedModel | None) -> None:
    """Refuse adapters where there is nothing that makes them, or nothing that they could go on.

    Args:
        training: says whether they are asked for.
        model: that is to learn; None where it has yet to be made, with factors.

    Raises:
        SettingError: they are asked for, and peft is not installed, or `model` has no factors.
    """
    if training.trainable != "adapters":
        return
    if importlib.util.find_spec("peft") is None:
        raise SettingError("training.trainable 'adapters' needs peft: pip install 'makd[adapters]'.")
    if model is not None and not _factors(model):
        raise SettingError(
            "training.trainable is 'adapters', and the model has no factors to put them on. Factorize it first, or "
            "take 'all' or 'linears'."
        )


def _factors(model: PreTrainedModel) -> list[str]:
    """Names of the factors of its linears."""
    factored = [name for name in resolve(model).linears if isinstance(model.get_submodule(name), StandIn)]
    return factor_names(model, factored)


def _adapt_(model: PreTrainedModel, rank: int, seeds: Sequence[int]) -> Any:
    """Put adapters on the factors of `model`, in place, and let them alone learn."""
    from peft import LoraConfig, LoraModel

    stacks = resolve(model).stacks
    if any(isinstance(getattr(model.get_submodule(stack.module), stack.leaf), nn.Module) for stack in stacks):
        logger.warning(
            "Adapters go on the factors of linears; those of experts stay as they are. training.trainable 'linears' "
            "learns both"
        )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.default_generator.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
        return LoraModel(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_factors(model)), "default")
