"""Station 7: teacher, student and losses of a batch, as one forward of the student.

Engines for many processes (DDP, FSDP, DeepSpeed) wrap a module and watch its forward: they reduce the gradients that
its output leads to, and have a sharded layer's weights whole while it runs. So losses that are made of what lies inside
a model have to be made inside its forward. `DistillationForward` puts them there for one call, whatever the engine has
put around the student.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy
from makd.anatomy.key_cache import without_cache
from makd.anatomy.replaced_forward import replaced_forward
from makd.aspects import ActivePlan, KeptPredictions
from makd.cache import TeacherCache
from makd.capture import HeadCall, Recording, capture, withhold_logits, without_labels
from makd.distill.engines.sharded import hold_head, reaching_output
from makd.distill.losses.counted import LossKey
from makd.distill.losses.layers import LayerLosses
from makd.distill.losses.objective import by_term, mean_losses, prediction_losses, weighted_sum
from makd.distill.losses.projections import Projections
from makd.distill.losses.shares import Shares
from makd.distill.losses.teacher_variances import TeacherVariances


@dataclass(frozen=True)
class DistillationOutput:
    """What the forward of one batch has come to."""

    total: Float[Tensor, ""]
    """What is minimised."""
    losses: Mapping[LossKey, Float[Tensor, ""]]
    """Each mean alone, unweighted and without gradient."""
    output: Any
    """The student's ModelOutput."""


@dataclass(frozen=True)
class DistillationForward:
    """Runs teacher, student and losses of a batch as one forward of the student; made once per training."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    plan: ActivePlan
    anatomy: Anatomy
    """Of the student."""
    teacher_anatomy: Anatomy
    projections: Projections | None
    label_shift: int | None
    """As `shared_label_shift` gives it: None where the models make their logits."""
    cache: TeacherCache | None
    teacher_variances: TeacherVariances
    label_names: frozenset[str]
    teacher_precision: Callable[[], AbstractContextManager[Any]]

    def __call__(
        self,
        wrapped: nn.Module,
        inputs: Mapping[str, Tensor],
        rows: Tensor | None,
        shares: Shares,
        *,
        with_logits: bool = False,
    ) -> DistillationOutput:
        """Run teacher, student and losses as a forward of `wrapped`.

        Args:
            wrapped: the student, or what an engine has made of it.
            inputs: the batch, with labels if it has some.
            rows: where the batch's rows are in a teacher's cache; None asks the teacher.
            shares: what part of the optimizer step the batch is.
            with_logits: whether the output has logits where the models withhold them.

        Raises:
            MakdError: as the losses raise it.
        """
        kept: dict[str, Any] = {}

        def forward(**given: Tensor | None) -> dict[str, Tensor]:
            # peft fills in None for what it knows and is not given
            batch = {name: tensor for name, tensor in given.items() if tensor is not None}
            total, kept["losses"], kept["output"] = self._run(own, batch, rows, shares, with_logits)
            return {"loss": total}  # an engine looks for gradients in all that is returned: the sum alone has them

        if self.label_shift is not None:
            hold_head(self.student)
        own = self.student.forward
        with replaced_forward(self.student, forward):
            returned = wrapped(**inputs)
        return DistillationOutput(returned["loss"], **kept)

    @torch.no_grad()
    def teacher_forward(
        self, inputs: Mapping[str, Tensor], rows: Tensor | None
    ) -> tuple[Recording, Any, HeadCall | KeptPredictions | None]:
        """The teacher's forward on the batch, without labels: its own loss is of no use. Or what a cache has of it."""
        if self.cache is not None and rows is not None:
            return self.cache.recall(rows.tolist(), self.plan, self.teacher_anatomy, inputs)
        if not self.plan.needs_teacher:
            return Recording(), None, None
        with (
            self.teacher_precision(),
            capture(
                self.teacher, self.teacher_anatomy, self.plan.teacher_taps, device=inputs["input_ids"].device
            ) as recording,
            self._withhold(self.teacher) as head,
            without_cache(self.teacher),
        ):
            output = self.teacher(**self._without_labels(self.teacher, inputs))
        return recording, output, head

    def _run(
        self,
        own: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        rows: Tensor | None,
        shares: Shares,
        with_logits: bool,
    ) -> tuple[Tensor, dict[LossKey, Tensor], Any]:
        """The plan's weighted sum, its means and the student's output; `own` is the forward that was replaced."""
        recording, teacher_output, teacher_head = self.teacher_forward(inputs, rows)
        layers = LayerLosses(self.anatomy, inputs, recording, self.plan, self.projections, self.teacher_variances)
        with (
            capture(self.student, self.anatomy, self.plan.taps, layers.receive),
            self._withhold(self.student) as head,
            without_cache(self.student),
        ):
            output = own(**(inputs if head is None else self._without_labels(self.student, inputs)))
        losses = mean_losses(self.plan, self.anatomy, inputs, layers, teacher_output, output, head is None)
        terms, predicted = by_term(self.plan, losses, shares), None
        if head is not None:
            predicted, alone = prediction_losses(
                self.plan, self.anatomy, inputs, teacher_head, head, label_shift=self.label_shift or 0, shares=shares
            )
            losses.update(alone)
            terms |= alone
            if with_logits:
                output["logits"] = head.logits()
        total = reaching_output(self.student, weighted_sum(self.plan, terms, predicted), output)
        return total, {mean: loss.detach() for mean, loss in losses.items()}, output

    def _withhold(self, model: PreTrainedModel) -> AbstractContextManager[HeadCall | None]:
        """A forward inside makes no logits of a whole batch, if it need not."""
        return nullcontext() if self.label_shift is None else withhold_logits(model)

    def _without_labels(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = without_labels(model, inputs, {"labels", *self.label_names})
        return found
