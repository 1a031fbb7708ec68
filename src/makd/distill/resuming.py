"""Station 7: a training that goes on where it was stopped."""

from pathlib import Path

from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint


def train(trainer: Trainer, checkpoints: Path, resume: bool) -> int:
    """Train to the end, with `resume` from the last checkpoint on, if there is one; gives the real tokens read.

    A training that had already ended is not begun again: the Trainer would take one more step.
    """
    last = get_last_checkpoint(str(checkpoints)) if resume and checkpoints.is_dir() else None
    if last is not None:
        state = TrainerState.load_from_json(str(Path(last) / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            trainer._load_from_checkpoint(last)
            return int(state.num_input_tokens_seen)
    trainer.train(resume_from_checkpoint=last)
    return int(trainer.state.num_input_tokens_seen)
