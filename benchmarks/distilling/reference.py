"""The same losses as makd's, written plainly: `output_attentions`, `output_hidden_states`, logits of all tokens.

What a careful person writes in an afternoon with eager attention; makd's rows are held against it, in value and cost.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import makd
from makd.aspects import ActivePlan, activate


class Eager:
    """The weighted sum of a preset's losses for a teacher and its student, both with eager attention."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, preset: str) -> None:
        self.student, self.teacher = student, teacher
        self.anatomy = makd.resolve(student)
        self.plan: ActivePlan = activate(makd.Plan(preset=preset), self.anatomy)
        aspects = {active.term.aspect for active in self.plan.terms}
        self.wants = {"output_attentions": "attention" in aspects, "output_hidden_states": "hidden" in aspects}

    def loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One batch's loss; the teacher's forward and the student's are in it."""
        questions = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad(), self._outputs(self.teacher) as theirs:
            teacher = self.teacher(**questions, **self.wants)
        with self._outputs(self.student) as ours:
            student = self.student(**inputs, **self.wants)
        mask = inputs["attention_mask"].bool()
        total = torch.zeros((), device=mask.device)
        for active in self.plan.terms:
            term = active.term
            if term.aspect == "task":
                total = total + term.weight * (0.0 if student.get("loss") is None else student.loss)
            elif term.aspect == "logits":
                total = total + term.weight * divergence(student.logits, teacher.logits, mask)
            elif term.aspect == "embedding":
                total = total + term.weight * embedding(student[0], teacher[0], mask)
            else:
                parts = []
                for tap in active.taps:
                    if tap.kind == "attention":
                        pair = student.attentions[tap.layer], teacher.attentions[tap.layer]
                        parts.append(attention(*pair, mask))
                        continue
                    key = tap.layer if tap.role is None else self.anatomy.layers[tap.layer].roles[tap.role].module
                    parts.append(distance(_state(ours, student, key), _state(theirs, teacher, key), mask))
                total = total + term.weight * torch.stack(parts).mean()
        return total

    @contextmanager
    def _outputs(self, model: PreTrainedModel) -> Iterator[dict[Any, Tensor]]:
        """Outputs of the linears that the plan compares, and of the last layer: a decoder's own is after its norm."""
        found: dict[Any, Tensor] = {}
        last = self.anatomy.layers[-1]
        places: dict[str, Any] = {last.module: last.index}
        for tap in self.plan.taps:
            if tap.role is not None:
                linear = self.anatomy.layers[tap.layer].roles[tap.role]
                assert linear.part is None, "fused linears are not written out here"
                places[linear.module] = linear.module

        def keep(key: Any) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                found[key] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [model.get_submodule(name).register_forward_hook(keep(key)) for name, key in places.items()]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def _state(found: Mapping[Any, Tensor], output: Any, key: Any) -> Tensor:
    return found[key] if key in found else output.hidden_states[key + 1]


def _real(values: Tensor, mask: Tensor) -> Tensor:
    """Rows of real tokens; a batch without padding is not copied."""
    return values.flatten(0, 1) if bool(mask.all()) else values[mask]


def distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference in units of the teacher's variance around each channel's mean."""
    ours, theirs = _real(student, mask).float(), _real(teacher, mask).float()
    return nn.functional.mse_loss(ours, theirs) / theirs.var(0, unbiased=False).mean()


def attention(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL of probabilities (batch, heads, queries, keys), mean over heads and real queries."""
    logarithm = student.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    kl = nn.functional.kl_div(logarithm, teacher.float(), reduction="none").sum(-1)
    return _real(kl.transpose(1, 2), mask).mean()


def divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL of predictions, mean over real tokens."""
    ours, theirs = (_real(logits, mask).float().log_softmax(-1) for logits in (student, teacher))
    return nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def embedding(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """1 - cosine of the means over real tokens."""
    weights = mask.unsqueeze(-1).float()
    ours, theirs = ((side * weights).sum(1) / weights.sum(1) for side in (student, teacher))
    return (1 - nn.functional.cosine_similarity(ours, theirs)).mean()
