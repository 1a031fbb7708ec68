"""Station 8: student and teacher on held-out text, each run once for all that is asked of it."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy.eval_mode import in_eval
from makd.evaluation.fidelity import Fidelity, outputs_of_both
from makd.evaluation.perplexity import TokenCosts
from makd.sentence_encoder import AUTO


@torch.no_grad()
def fidelity_and_perplexities(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    pooling: str = AUTO,
    tokens: Literal["all", "completion"] = "all",
) -> tuple[dict[str, float], dict[Literal["student", "teacher"], float]]:
    """What `fidelity` says of two language models, and what `perplexity` says of each, for one forward of each.

    Arguments and errors are those of the two.
    """
    found = Fidelity(student, teacher, pooling, tokens)
    ours, theirs = TokenCosts(student), TokenCosts(teacher)
    with in_eval(student, teacher):
        for batch, output, reference in outputs_of_both(student, teacher, batches):
            found.add(batch, output, reference)
            ours.add(output, batch)
            theirs.add(reference, batch)
    return found.scores(), {"student": ours.perplexity(), "teacher": theirs.perplexity()}
