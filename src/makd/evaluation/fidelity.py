"""Station 8: how close student and teacher are without any label.

Encoders without a head are compared by what they are used for, the similarities between texts; models with a head by
their predictions.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy.batches import check_batches
from makd.anatomy.tokens import decoder_tokens, encoder_tokens
from makd.aspects import Pooling, pool
from makd.errors import DataError
from makd.kinds import takes

TEXTS_COMPARED = 1000
"""Texts whose pairwise similarities are ranked, at most: pairs grow with the square."""


@takes
@torch.no_grad()
def fidelity(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    pooling: Pooling = "mean",
) -> dict[str, float]:
    """Compare both models on `batches`; the keys that apply, each over real tokens only.

    - `rank_correlation`: Spearman's, between the teacher's and the student's cosine similarities of all pairs of texts
      (the first `TEXTS_COMPARED`), for models that end in hidden states.
    - `cosine`: mean cosine between the two embeddings of a text, for the same models.
    - `prediction_kl`: KL(teacher ‖ student) of the predictions, in nats a prediction (a token, or a text).
    - `top1_agreement`: share of predictions where both have the same most likely class.
    - `squared_difference`: of the outputs of a regression, a mean over texts.

    Raises:
        DataError: there are no batches.
    """
    sums: dict[str, float] = {}
    count = 0
    ours, theirs = [], []
    modes = student.training, teacher.training
    student.eval(), teacher.eval()
    for batch in check_batches(batches, student):
        inputs = {name: value.to(student.device) for name, value in batch.items() if name != "labels"}
        output = student(**inputs)
        reference = teacher(**{name: value.to(teacher.device) for name, value in inputs.items()})
        if "logits" in output or "start_logits" in output:
            found, number = _compare_predictions(output, reference, batch)
            count += number
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
        else:
            mask = _output_tokens(inputs)
            ours.append(pool(output[0].float(), mask, pooling).cpu())
            theirs.append(pool(reference[0].float(), mask.to(teacher.device), pooling).cpu())
    student.train(modes[0]), teacher.train(modes[1])
    if not ours and not count:
        raise DataError("There is nothing to compare on: no batches were given.")
    if ours:
        return _compare_embeddings(torch.cat(ours), torch.cat(theirs))
    return {name: value / count for name, value in sums.items()}


def _output_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Real tokens of what the model puts out: the target's, in an encoder-decoder."""
    return decoder_tokens(batch) if "decoder_input_ids" in batch else encoder_tokens(batch)


def _compare_embeddings(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    ours, theirs = (torch.nn.functional.normalize(side, dim=-1) for side in (ours, theirs))
    scores = {"cosine": float((ours * theirs).sum(-1).mean())}
    ours, theirs = ours[:TEXTS_COMPARED], theirs[:TEXTS_COMPARED]
    rows, columns = torch.triu_indices(len(ours), len(ours), offset=1)
    if len(rows) > 1:
        similarities = [(side @ side.T)[rows, columns].numpy() for side in (ours, theirs)]
        scores["rank_correlation"] = float(spearmanr(*similarities).statistic)
    return scores


def _compare_predictions(output: Any, reference: Any, batch: Mapping[str, Tensor]) -> tuple[dict[str, float], int]:
    """Sums over the batch's predictions, and how many there are."""
    if "start_logits" in output:
        hidden = torch.finfo(torch.float32).min
        mask = encoder_tokens(batch).to(output.start_logits.device)
        pairs = [(output[name].masked_fill(~mask, hidden), reference[name].masked_fill(~mask, hidden))
                 for name in ("start_logits", "end_logits")]  # fmt: skip
        ours, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
    elif output.logits.shape[-1] == 1:
        difference = (output.logits - reference.logits.to(output.logits.device)).float().square()
        return {"squared_difference": float(difference.sum())}, len(difference)
    elif output.logits.dim() == 3:
        tokens = _output_tokens(batch)
        ours, theirs = (side.logits[tokens.to(side.logits.device)] for side in (output, reference))
    else:
        ours, theirs = output.logits, reference.logits
    theirs = theirs.to(ours.device)
    kl = agree = 0.0
    for mine, other in zip(ours.split(512), theirs.split(512), strict=True):  # a vocabulary is wide
        width = min(mine.shape[-1], other.shape[-1])
        log_s = mine[..., :width].float().log_softmax(-1)
        log_t = other[..., :width].float().log_softmax(-1)
        kl += float(torch.nn.functional.kl_div(log_s, log_t, reduction="sum", log_target=True))
        agree += float((log_s.argmax(-1) == log_t.argmax(-1)).sum())
    return {"prediction_kl": kl, "top1_agreement": agree}, len(ours)
