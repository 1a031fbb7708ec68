"""Station 7: a training that goes on where it was stopped, and leaves the model as it is saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint


def train(trainer: Trainer, checkpoints: Path, resume: bool) -> int:
    """Train to the end, with `resume` from the last checkpoint on, if there is one; gives the real tokens read.

    A training that had already ended is not begun again: the Trainer would take one more step. After a training in
    bfloat16 the model's forward is its own again, without autocast.
    """
    last = get_last_checkpoint(str(checkpoints)) if resume and checkpoints.is_dir() else None
    if last is not None:
        state = TrainerState.load_from_json(str(Path(last) / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            trainer._load_from_checkpoint(last)
            return int(state.num_input_tokens_seen)
    with _own_forward_after(trainer):
        trainer.train(resume_from_checkpoint=last)
    return int(trainer.state.num_input_tokens_seen)


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
