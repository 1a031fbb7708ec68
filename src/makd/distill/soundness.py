"""Station 7: a training that has broken its model says so, before a checkpoint or its caller keeps the rest."""

from typing import Any

from transformers import TrainerCallback

from makd.weights.sound import check_learned


class StopWhereBroken(TrainerCallback):
    """Looks at all weights before each checkpoint and at the end: no loss has seen what the last step made of them."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look before a checkpoint.

        Raises:
            NumericsError: a weight holds NaN or infinity.
        """
        if control.should_save:
            check_learned(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the result.

        Raises:
            NumericsError: a weight holds NaN or infinity.
        """
        check_learned(model)
