"""Station 7: the unit of squared differences, the teacher's variance, measured once for a whole training.

One unit for all batches makes the loss a mean over tokens, however rows are split into batches, accumulated steps and
processes. Each batch's own would be another loss for each way to split. It is measured on the batches of the first
optimizer step, of all processes, which takes one more forward of the teacher.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from makd.anatomy import Anatomy
from makd.anatomy.tokens import by_token
from makd.aspects import ActivePlan, Comparison, variance_sums, variance_unit
from makd.capture import Recording
from makd.devices import widest_dtype
from makd.distill.losses.counted import TokenMasks
from makd.distill.losses.shares import add_up

FILE = "units.json"
"""Where a checkpoint keeps them."""


class TeacherVariances(dict[Comparison, float]):
    """The unit of each comparison of squared differences; empty until they are measured."""

    def __init__(self, plan: ActivePlan) -> None:
        """Of the comparisons of `plan`."""
        super().__init__()
        self._wanted = [one for one in plan.comparisons if one.measure == "mse"]

    @property
    def are_missing(self) -> bool:
        """Whether they have yet to be measured."""
        return len(self) < len(self._wanted)

    def measure(
        self,
        batches: Sequence[Mapping[str, Tensor]],
        anatomy: Anatomy,
        teach: Callable[[Mapping[str, Tensor]], Recording],
        device: torch.device,
    ) -> None:
        """Measure them on the batches of all processes, each of which calls this with its own.

        Args:
            batches: of one optimizer step.
            anatomy: of the student.
            teach: gives what the teacher has at the plan's taps for a batch.
            device: where sums over processes are made.
        """
        sums: dict[Comparison, list[Tensor]] = {}
        for batch in batches:
            recording, counted = teach(batch), TokenMasks(anatomy, batch)
            for one in self._wanted:
                real, _ = counted.real(one.tap)
                states = by_token(recording.tensors[one.teacher], real, f"What layer {one.teacher.layer} gives")
                wide = widest_dtype(states.device)
                found = [part.to(wide) for part in variance_sums(states, counted.of(one))]
                before = sums.get(one)
                sums[one] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
        flat = torch.cat([part.reshape(-1).to(device) for one in self._wanted for part in sums[one]])
        sizes = [part.numel() for one in self._wanted for part in sums[one]]
        parts = iter(add_up(flat).split(sizes))
        units = [variance_unit(next(parts)[0], next(parts)[0], next(parts)) for _ in self._wanted]
        self.update(zip(self._wanted, torch.stack(units).tolist(), strict=True))

    def save(self, folder: str | Path) -> None:
        """Beside a checkpoint."""
        (Path(folder) / FILE).write_text(json.dumps([self[one] for one in self._wanted]), encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """As `save` left them; a checkpoint without lets them be measured anew."""
        file = Path(folder) / FILE
        if file.is_file():
            self.update(zip(self._wanted, json.loads(file.read_text(encoding="utf-8")), strict=True))
