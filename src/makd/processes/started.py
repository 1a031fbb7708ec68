"""Which of a run's processes this one is, and their opening. Stands below every station.

torchrun and accelerate launch start a program several times and say in its environment how often, and which one it is.
Whoever starts makd by itself has one process: then nothing here imports torch, or costs anything.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from makd.errors import SettingError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

PATIENCE = timedelta(days=30)
"""How long a process waits for another, which may factorize for hours. That one is dead is told by what started it."""

_messages: list["ProcessGroup"] = []
"""The group through which processes talk, when it is open."""


def process_count() -> int:
    """How many processes this run has."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def process_index() -> int:
    """Which of them this one is, from 0 on."""
    return _number("RANK", 0) if process_count() > 1 else 0


def is_first() -> bool:
    """Whether this one writes and prints; a process that is alone does."""
    return process_index() == 0


def name() -> str:
    """What a person calls this one."""
    return f"process {process_index() + 1} of {process_count()}"


def group() -> "ProcessGroup":
    """The group through which the processes of a run talk; opened when it is first asked for, by all of them.

    Beside it stands torch's default group, which the Trainer takes up: accelerate chooses its kind, by the machine, and
    makes each process's own accelerator the current one.
    """
    if not _messages:
        _open()
    return _messages[0]


def close() -> None:
    """End the talk, at the normal end of a program: else torch warns of it."""
    if _messages:
        import torch.distributed as dist

        _messages.clear()
        dist.destroy_process_group()


@contextmanager
def loading_in_each_process() -> Iterator[None]:
    """Inside, a model's weights are read in every process.

    Under FSDP transformers may read them in the first alone and leave the others' memory as it was, for accelerate to
    fill what it shards: a teacher, which it does not, would be noise.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def check_alone(what: str, instead: str) -> None:
    """Refuse several processes where they would do the same several times.

    Args:
        what: that is done by one.
        instead: what to do next.

    Raises:
        SettingError: the run was started as several processes.
    """
    if process_count() > 1:
        raise SettingError(f"{what} runs in one process, and this one was started {process_count()} times. {instead}")


def check_device(device: "torch.device") -> None:
    """Refuse a device that a training would not take: transformers' Trainer has a choice of its own.

    Raises:
        SettingError: it is not the first accelerator that a single process sees; or, of several processes, not this
            one's own, or of a kind that cannot be shared.
    """
    if device.type == "cpu":
        return
    if process_count() == 1:
        if device.index not in (None, 0):
            visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
            meant = visible[device.index] if device.index < len(visible) else device.index
            raise SettingError(
                f"device is {device}, and a process takes the first accelerator that it sees, as transformers' Trainer "
                f"does. Set CUDA_VISIBLE_DEVICES={meant} and take device {device.type}."
            )
        return
    import torch

    if device.type == "mps":
        raise SettingError("Several processes cannot train on mps. Take device cpu, or start one process.")
    if device.index not in (None, torch.accelerator.current_device_index()):
        raise SettingError(
            f"device is {device}, and each of this run's {process_count()} processes has an accelerator of its own. "
            f"Take device auto or {device.type}; CUDA_VISIBLE_DEVICES says which of them there are."
        )


def _open() -> None:
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    if not dist.is_initialized():
        if torch.cuda.is_available():  # so that what stands on the CPU can be sent too
            PartialState(backend="cpu:gloo,cuda:nccl", timeout=PATIENCE)
        else:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            PartialState(cpu=accelerator is None or accelerator.type == "mps", timeout=PATIENCE)
    _messages.append(dist.new_group(backend="gloo", timeout=PATIENCE))


def _number(variable: str, otherwise: int) -> int:
    """What an environment variable says; what is no number was not meant for us."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else otherwise
