"""Station 8: how close student and teacher are without any label.

Encoders without a head are compared by what they are used for, the similarities between texts; models with a head by
their predictions.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from makd.anatomy import Predictions
from makd.anatomy.batches import check_batches, model_inputs
from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.tokens import decoder_tokens, encoder_tokens, predicting_tokens
from makd.errors import DataError
from makd.evaluation.pairing import common_predictions
from makd.kinds import takes
from makd.sentence_encoder import (
    AUTO,
    SentenceEncoder,
    check_pooling,
    encoder_of,
    find_folder,
    is_sentence_encoder,
    origin_of,
)
from makd.weights.finite import check_measured, check_outputs

logger = logging.getLogger(__name__)

TEXTS_COMPARED = 1000
"""Texts whose pairwise similarities are ranked, at most: pairs grow with the square."""


@takes
@torch.no_grad()
def fidelity(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    pooling: str = AUTO,
    tokens: Literal["all", "completion"] = "all",
) -> dict[str, float]:
    """Compare both models on `batches`; the keys that apply, each over real tokens only.

    - `rank_correlation`: Spearman's, between the teacher's and the student's similarities of all pairs of texts (the
      first `TEXTS_COMPARED`), for models that end in hidden states: cosines, or what the teacher's folder says.
    - `cosine`: mean cosine between the two embeddings of a text, for the same models.
    - `prediction_kl`: KL(teacher ‖ student) of the predictions, in nats a prediction (a token, a text, or a label that
      holds or not).
    - `top1_agreement`: share of predictions where both have the same most likely class.
    - `label_agreement`: share of labels of which both say that they hold, or both that they do not.
    - `label_set_agreement`: share of texts where both say so of the same set of labels.
    - `squared_difference`: of the outputs of a regression, a mean over texts and outputs.

    Args:
        student: the model that is measured.
        teacher: the model that it mimics.
        batches: tokens, as both models read them.
        pooling: how a text's vector is made of its hidden states: `auto`, or as `Term.pooling` says. With `auto` the
            vectors go through the modules of the teacher's sentence-transformers folder that follow the pooling, too.
        tokens: whether the predictions of all real tokens count, or those of completions, by the batches' labels.

    Raises:
        DataError: there are no batches; or completions are to count, and a batch has no labels.
        UnsupportedModelError: nobody knows what the models predict.
        SettingError: they do not predict the same, `pooling` is not known, or the teacher's folder asks for what makd
            cannot carry out.
        NumericsError: outputs hold NaN or infinity, or a measurement does.
    """
    found = Fidelity(student, teacher, pooling, tokens)
    with in_eval(student, teacher):
        for batch, output, reference in outputs_of_both(student, teacher, batches):
            found.add(batch, output, reference)
    return found.scores()


def outputs_of_both(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]
) -> Iterator[tuple[Mapping[str, Tensor], ModelOutput, ModelOutput]]:
    """Each of the batches with the student's output for it and the teacher's, each on its model's device."""
    for batch in check_batches(batches, student):
        with without_cache(student, teacher):
            output, reference = (model(**model_inputs(batch, model.device)) for model in (student, teacher))
        yield batch, output, reference


class Fidelity:
    """What `fidelity` says, counted from outputs that somebody else computes."""

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, pooling: str, tokens: Literal["all", "completion"]
    ) -> None:
        """Arguments and errors as of `fidelity`."""
        check_pooling(pooling, "The pooling")
        self._predictions = common_predictions(student, teacher)
        self._models, self._pooling, self._tokens = (student, teacher), pooling, tokens
        self._sums: dict[str, tuple[float, int]] = {}
        self._embeddings: list[tuple[Tensor, Tensor]] = []
        self._encoder: SentenceEncoder | None = None

    def add(self, batch: Mapping[str, Tensor], output: ModelOutput, reference: ModelOutput) -> None:
        """Count a batch: the student's output for it, and the teacher's."""
        if self._predictions is None:
            self._encoder = self._encoder or _encoder(*self._models, self._pooling)
            mask = _output_tokens(batch)
            ours, theirs = (self._encoder(side[0].float(), mask.to(side[0].device)) for side in (output, reference))
            self._embeddings.append((ours.cpu(), theirs.cpu()))
            return
        counted = _counted(self._predictions, batch, self._tokens)
        for name, (value, number) in _compare_predictions(self._predictions, output, reference, counted).items():
            before = self._sums.get(name, (0.0, 0))
            self._sums[name] = before[0] + value, before[1] + number

    def scores(self) -> dict[str, float]:
        """The keys that apply, over all that was counted.

        Raises:
            DataError: that is nothing.
            NumericsError: outputs hold NaN or infinity, or a measurement does.
        """
        if self._embeddings:
            ours, theirs = (torch.cat(side) for side in zip(*self._embeddings, strict=True))
            similarity = "cosine" if self._encoder is None else self._encoder.similarity
            found = _compare_embeddings(ours, theirs, similarity)
        elif self._sums:
            found = {name: value / count for name, (value, count) in self._sums.items()}
        else:
            raise DataError("There is nothing to compare on: no batches were given.")
        check_measured(found, "between student and teacher")
        return found


def _encoder(student: PreTrainedModel, teacher: PreTrainedModel, pooling: str) -> SentenceEncoder:
    """The teacher's, for both; where the student's folder has another one, that is said."""
    encoder = encoder_of(origin_of(teacher), pooling)
    origin = origin_of(student)
    folder = find_folder(origin.name)
    has_own = folder is not None and is_sentence_encoder(folder)
    if has_own and not encoder_of(origin, pooling).embeds_as(encoder):
        logger.warning(
            "%s pools, or goes on after the pooling, in another way than its teacher: it was trained further, or is "
            "another's student. It is measured with the teacher's modules. What its users get, with its own, the "
            "evaluators of sentence-transformers measure.",
            folder,
        )
    return encoder


def _output_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Real tokens of what the model puts out: the target's, in an encoder-decoder."""
    return decoder_tokens(batch) if "decoder_input_ids" in batch else encoder_tokens(batch)


def _compare_embeddings(ours: Tensor, theirs: Tensor, similarity: str) -> dict[str, float]:
    check_outputs(theirs, "The teacher's hidden states")
    check_outputs(ours, "The student's hidden states")
    units = [torch.nn.functional.normalize(side, dim=-1) for side in (ours, theirs)]
    # vectors of two widths have no angle; similarities among each side's own can be compared all the same
    alike = ours.shape[-1] == theirs.shape[-1]
    scores = {"cosine": float((units[0] * units[1]).sum(-1).mean())} if alike else {}
    compared = units if similarity == "cosine" else (ours, theirs)
    ours, theirs = (side[:TEXTS_COMPARED] for side in compared)
    rows, columns = torch.triu_indices(len(ours), len(ours), offset=1)
    if len(rows) > 1:
        similarities = [_alike(side, similarity)[rows, columns].numpy() for side in (ours, theirs)]
        if all(side.min() < side.max() for side in similarities):  # else there is no order to agree with
            scores["rank_correlation"] = float(spearmanr(*similarities).statistic)
    return scores


def _alike(vectors: Tensor, similarity: str) -> Tensor:
    """How alike each text is to each, (texts, texts); for cosines the vectors have length 1."""
    if similarity in ("cosine", "dot"):
        return vectors @ vectors.T
    return -torch.cdist(vectors, vectors, p=1.0 if similarity == "manhattan" else 2.0)


def _counted(predictions: Predictions, batch: Mapping[str, Tensor], tokens: Literal["all", "completion"]) -> Tensor:
    """The tokens whose predictions count."""
    if predictions.target == "places":
        return encoder_tokens(batch)
    return predicting_tokens(batch, predictions.label_shift) if tokens == "completion" else _output_tokens(batch)


def _compare_predictions(
    predictions: Predictions, output: ModelOutput, reference: ModelOutput, tokens: Tensor
) -> dict[str, tuple[float, int]]:
    """By the name of each measure its sum over the batch, and over how many."""
    ours = predictions.rows(output, tokens)
    theirs = predictions.rows(reference, tokens).to(ours.device)
    check_outputs(theirs, "The teacher's predictions")
    check_outputs(ours, "The student's predictions")
    if predictions.target == "numbers":
        return {"squared_difference": (float((ours - theirs).float().square().sum()), ours.numel())}
    kl = agree = 0.0
    for mine, other in zip(ours.split(512), theirs.split(512), strict=True):  # a vocabulary is wide
        width = min(mine.shape[-1], other.shape[-1])
        log_s = mine[..., :width].float().log_softmax(-1)
        log_t = other[..., :width].float().log_softmax(-1)
        kl += float(torch.nn.functional.kl_div(log_s, log_t, reduction="sum", log_target=True))
        agree += float((log_s.argmax(-1) == log_t.argmax(-1)).sum())
    if predictions.target != "labels":
        return {"prediction_kl": (kl, len(ours)), "top1_agreement": (agree, len(ours))}
    found = {"prediction_kl": (kl, len(ours)), "label_agreement": (agree, len(ours))}
    if predictions.each == "row":
        sets = [side.argmax(-1).unflatten(0, (-1, predictions.size or 1)) for side in (ours, theirs)]
        found["label_set_agreement"] = float((sets[0] == sets[1]).all(-1).sum()), len(sets[0])
    return found
