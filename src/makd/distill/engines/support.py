"""Station 7: what the Trainer's engines for many processes need to be told, or cannot do."""

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from makd.anatomy import Anatomy
from makd.aspects import Completions
from makd.data import TokenBatchSampler
from makd.distill.arguments import check_checkpoints_layers
from makd.distill.losses.shares import in_order
from makd.distill.training import TrainingConfig
from makd.errors import SettingError
from makd.processes import started as processes

_logger = logging.getLogger(__name__)


def with_engine(args: TrainingArguments | None) -> TrainingArguments:
    """A trainer's own copy of `args`, with what depends on a plan: who gets a gradient; one process has one device.

    Args:
        args: the caller's, perhaps for other trainers, too: not changed, now or when the trainer changes its own. None
            takes those that the Trainer would make itself.

    Returns:
        What the Trainer is to be given.
    """
    args = TrainingArguments("tmp_trainer") if args is None else copy.copy(args)
    if args.ddp_find_unused_parameters is None:
        # a plan may end inside the model. Transformers says no where layers are checkpointed, for reentrant ones only
        args.ddp_find_unused_parameters = True
    if args.n_gpu > 1:
        _logger.warning(
            "%d GPUs are here, and one process trains on one of them. `torchrun --nproc-per-node %d` uses all.",
            args.n_gpu,
            args.n_gpu,
        )
        args._n_gpu = 1  # transformers would take torch's DataParallel, whose copies of a model no hook sees
    return args


def is_sharding_asked() -> bool:
    """Whether accelerate was told to shard by FSDP, as `accelerate launch --use_fsdp` does."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_engine(model: PreTrainedModel, training: TrainingConfig, completions: Completions) -> None:
    """Refuse a training that no engine here would carry out, before any work that this would make useless.

    Args:
        model: that learns, or that one is made of which does, on its device.
        training: how.
        completions: whose are learned from.

    Raises:
        SettingError: FSDP is asked for where accelerate has none, a teacher is to be sharded without it or while it
            writes, or the model cannot compute its layers again.
    """
    if training.gradient_checkpointing:
        check_checkpoints_layers(model)
    sharded = is_sharding_asked()
    where = _unsharded_where(model.device)
    if sharded and where is not None:
        raise SettingError(f"FSDP is asked for, and this run is {where}{_SHARDS}")
    if training.shard_teacher:
        check_sharded_teacher(sharded, completions)


def _unsharded_where(device: torch.device) -> str | None:
    """Where a run is that accelerate would not shard, on `device`; None where it would."""
    if device.type == "cpu":
        return "on the CPU"
    return None if "LOCAL_RANK" in os.environ else "in a process that was started by itself"


_SHARDS = (
    ": accelerate shards on GPUs only, in processes that torchrun or accelerate launch has started. Start it so, or "
    "leave FSDP out."
)


def check_sharded_teacher(sharded: bool, completions: Completions) -> None:
    """Refuse to spread a teacher over the processes where that cannot be done.

    Raises:
        SettingError: FSDP is not in use; or the teacher is to write.
    """
    if completions.teacher_share:
        raise SettingError(
            "The teacher is to write completions, each process for its own prompts, and to be sharded, which takes "
            "all processes at once. Keep it whole (training.shard_teacher: false)."
        )
    if not sharded:
        raise SettingError(
            "The teacher is to be sharded, which FSDP2 does, and this training has none. Start it by `accelerate "
            "launch --use_fsdp --fsdp_version 2`, or keep the teacher whole (training.shard_teacher: false)."
        )


def prepare_engine_(trainer: Trainer, model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse what would not be what was asked for, and let FSDP shard a model by its layers, unless it is told how.

    Transformers names embeddings too among a model's parts (BERT), which accelerate then shards twice, and fails.

    Raises:
        SettingError: FSDP is asked for and not in use; or a model is to be split otherwise than by FSDP or DeepSpeed.
    """
    accelerator = trainer.accelerator
    if (is_sharding_asked() or trainer.args.fsdp) and accelerator.distributed_type != DistributedType.FSDP:
        raise SettingError(
            f"FSDP is asked for, and accelerate runs {accelerator.distributed_type.value} instead{_SHARDS}"
        )
    if trainer.is_fsdp_enabled and not accelerator.is_fsdp2:
        raise SettingError(
            "FSDP is asked for in its first version, which joins a layer's weights into one: no factor would be found "
            "in it. Set fsdp_version: 2 in accelerate's config, or `version: 2` in the Trainer's fsdp_config."
        )
    split = accelerator.parallelism_config
    others = {} if split is None else {name: getattr(split, f"{name}_size", 1) for name in ("tp", "cp", "sp")}
    found = [f"{name}_size = {size}" for name, size in others.items() if size > 1]
    if found:
        raise SettingError(
            f"The model is to be split by {' and '.join(found)}, and a plan compares tensors that are whole. Split by "
            "FSDP2 instead."
        )
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None:
        check_shared(model)
        # every process has the student already; and accelerate fills what is sharded alone, which no buffer is
        plugin.cpu_ram_efficient_loading = False
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layer_classes(model, anatomy)


def check_writers_whole() -> None:
    """Refuse to let models write whose weights DeepSpeed's third stage has split over the processes.

    Each forward takes all processes there, and these write after other prompts, with other numbers of forwards.

    Raises:
        SettingError: DeepSpeed runs its third stage.
    """
    if is_deepspeed_zero3_enabled():
        raise SettingError(
            "The plan has completions written, and DeepSpeed's ZeRO-3 splits the weights: processes would wait for "
            "each other for ever. Take ZeRO-2, or FSDP2, which splits them too; or a plan of the data's own text, such "
            "as preset kd."
        )


def layer_classes(model: PreTrainedModel, anatomy: Anatomy) -> list[str]:
    """Names of the classes that the layers of `model` are of, as accelerate wants them."""
    return sorted({type(model.get_submodule(layer.module)).__name__ for layer in anatomy.layers})


def check_shared(model: PreTrainedModel) -> None:
    """Refuse weights that FSDP2 would have to put in two groups."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if module is not model.get_output_embeddings():
            for weight in module.parameters(recurse=False):
                owners.setdefault(id(weight), []).append(name)
    shared = next((names for names in owners.values() if len(names) > 1), None)
    if shared is not None:
        raise SettingError(
            f"FSDP2 shards each weight with one module, and {' and '.join(shared)} of {type(model).__name__} share "
            "one. Train it whole in each process: leave FSDP out."
        )


def place_teacher_(teacher: PreTrainedModel, device: Any) -> None:
    """Take the teacher to the student's device, unless it has a place of its own: spread over devices, or offloaded."""
    places = set(map(str, getattr(teacher, "hf_device_map", {}).values()))
    if len(places) > 1 or "disk" in places:
        return
    nn.Module.to(teacher, device)


def check_same_teacher(teacher: PreTrainedModel) -> None:
    """Refuse a teacher that is not the same in all processes: each would teach something else, and none would say so.

    Raises:
        SettingError: its weights differ.
    """
    if processes.process_count() == 1:
        return
    weights = [weight for weight in teacher.parameters() if weight.device.type != "meta"]
    mine = repr([float(weight.detach().double().sum()) for weight in weights])  # text: NaN equals itself
    if len(set(in_order([mine]))) > 1:
        raise SettingError(
            "The teacher's weights are not the same in all processes. Under FSDP transformers loads them in the first "
            "alone where FSDP_CPU_RAM_EFFICIENT_LOADING is true, and leaves the others empty. Set "
            "fsdp_cpu_ram_efficient_loading: false in accelerate's config; a teacher that makd is given by name is "
            "whole in each."
        )


def check_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Refuse to go on from what another engine has kept: transformers would begin with a new optimizer, or fail.

    Raises:
        SettingError: one of the two is sharded, and the other is not.
    """
    kept = any(path.name.startswith("pytorch_model_fsdp") for path in folder.iterdir())
    if kept != trainer.is_fsdp_enabled:
        one, other = ("with FSDP", "without") if kept else ("without FSDP", "with it")
        raise SettingError(
            f"{folder} is of a training {one}, and this one is {other}. Go on as it was started; the number of "
            "processes may be another."
        )


def real_rows(trainer: Trainer, rows: int) -> int:
    """How many of an evaluation batch's rows are no repetition of earlier ones.

    Processes have equally many batches: the last of them are filled with the data's first rows again, or are, where
    batches are of so many tokens, first batches again.

    Args:
        trainer: that evaluates.
        rows: of this process's batch.
    """
    state = trainer.accelerator.gradient_state
    if trainer.args.world_size == 1 or not state.in_dataloader or not state.end_of_dataloader:
        return rows
    batches = getattr(trainer.callback_handler.eval_dataloader, "batch_sampler", None)
    batches = getattr(batches, "batch_sampler", batches)  # accelerate wraps it
    if isinstance(batches, TokenBatchSampler):
        return 0 if batches.ends_in_repetition else rows
    if state.remainder < 1:
        return rows
    left: int = state.remainder - trainer.args.process_index * trainer.args.eval_batch_size
    return min(rows, max(0, left))
