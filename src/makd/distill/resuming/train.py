"""Station 7: a training that goes on where it was stopped, and leaves the model as it is saved."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState

from makd.distill.resuming.checkpoints import ListFiles, checkpoint_folders, find_fault
from makd.processes.first import in_first

_logger = logging.getLogger(__name__)


def train(trainer: Trainer, checkpoints: Path, resume: bool) -> int:
    """Train to the end, with `resume` from the newest whole checkpoint on; gives the real tokens read.

    Checkpoints that are not whole are removed: the run writes them again. Where none is left, training begins anew.
    A training that had already ended is not begun again: the Trainer would take one more step. After a training in
    bfloat16 the model's forward is its own again, without autocast.
    """
    last = _newest_whole(checkpoints) if resume else None
    if last is not None:
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            trainer._load_from_checkpoint(str(last))
            trainer.state = state  # with the log of the whole training
            return int(state.num_input_tokens_seen)
    trainer.add_callback(ListFiles())
    trainer.add_callback(_OwnIntervals())
    with _own_forward_after(trainer):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return int(trainer.state.num_input_tokens_seen)


class _OwnIntervals(TrainerCallback):
    """A training that goes on saves and logs as it is told now; the Trainer would do so as the stopped one was."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the intervals of `args`."""
        state.compute_steps(args, state.max_steps)


@in_first
def _newest_whole(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint; newer ones that are not whole are removed."""
    for folder in checkpoint_folders(checkpoints):
        fault = find_fault(folder)
        if fault is None:
            _logger.info("going on from %s", folder.name)
            return folder
        _logger.warning("%s is not whole (%s) and is left out", folder, fault)
        shutil.rmtree(folder)
    return None


@contextmanager
def _own_forward_after(trainer: Trainer) -> Iterator[None]:
    """Take off the autocast that accelerate leaves around a model's forward: scores would be of rounded products.

    Accelerate's own way back (`unwrap_model`) takes off the decorators of transformers' forwards, too.
    """
    own = vars(trainer.model)
    before = own.get("forward")
    try:
        yield
    finally:
        own.pop("_original_forward", None)
        own.pop("forward", None)
        if before is not None:
            own["forward"] = before


def without_tied(found: Any, model: Any) -> Any:
    """What loading a checkpoint found to be missing, without the names of tied weights: files hold those once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return found._replace(missing_keys=[name for name in found.missing_keys if name not in tied])
