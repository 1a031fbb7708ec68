"""Station 1: what a model's predictions are. Solvers, losses, the teacher cache and fidelity all ask here.

Heads put out numbers that look alike: a row of logits may be one choice among classes, a yes or no for each label, or
plain numbers. A head that is not known by its class is never guessed at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from makd.anatomy.eval_mode import in_eval
from makd.errors import UnsupportedModelError

Target = Literal["classes", "labels", "numbers", "places", "unknown"]
"""How a head's numbers are read. `classes`: softmax, one choice. `labels`: a sigmoid each, any of them may hold.
`numbers`: as they are. `places`: softmax over the tokens of a row. `unknown`: nobody says."""

_LANGUAGE = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")


def class_names(mapping: Mapping[str, Any]) -> frozenset[str]:
    """The names of all classes in one of transformers' mappings from model types."""
    return frozenset(name for entry in mapping.values() for name in ([entry] if isinstance(entry, str) else entry))


_MASKED_NAMES = class_names(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
_LANGUAGE_NAMES = (
    class_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    | _MASKED_NAMES
    | class_names(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
)
_ROW_TARGETS: dict[str, Target] = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "numbers",
}
"""`problem_type` in a config -> what a row's numbers are."""


@dataclass(frozen=True)
class Predictions:
    """What a model with a head predicts."""

    target: Target
    each: Literal["token", "row"] = "row"
    """What has a prediction."""
    outputs: tuple[str, ...] = ("logits",)
    """Where they are in the model's output."""
    size: int | None = None
    """How many classes, labels or numbers there are; None: a vocabulary, or places."""
    names: tuple[str, ...] = ()
    """What these are called in the model's config, if it says."""
    reason: str = ""
    """Why they are not known."""
    label_shift: int = 0
    """How many tokens after the one that it stands at a prediction is of: 1 for causal language models."""

    def read(self, output: Any) -> list[Tensor]:
        """The numbers in a model's output, (rows, choices) or (rows, tokens, choices); of places (rows, tokens).

        Raises:
            UnsupportedModelError: the output lacks these numbers, or has them in another shape.
        """
        if self.target == "unknown":
            raise UnsupportedModelError(f"The model's predictions cannot be compared: {self.reason}.")
        found = []
        for name in self.outputs:
            values = output.get(name)
            if values is None:
                raise UnsupportedModelError(
                    f"The model's output has no {name}, which its head should give; it has {', '.join(output)}. "
                    "Load it under another head (recipe.head)."
                )
            if self.each == "token" and self.target == "labels" and values.dim() == 2:
                values = values[..., None]  # ELECTRA's discriminator: one number a token
            wanted = 3 if self.each == "token" else 2
            if values.dim() != wanted:
                raise UnsupportedModelError(
                    f"{name} in the model's output has the shape {tuple(values.shape)}; of {self.target} one "
                    f"{self.each} each it would have {wanted} dimensions. Load it under another head (recipe.head)."
                )
            found.append(values)
        return found

    def rows(self, output: Any, tokens: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "predictions choices"]:
        """One independent prediction a row: the logits of a softmax, or numbers as they are.

        A label that holds or not is a softmax of two: sigmoid(z) = softmax((z, 0))[0].

        Args:
            output: the model's.
            tokens: True at real ones.

        Raises:
            UnsupportedModelError: as for `read`.
        """
        found = self.read(output)
        tokens = tokens.to(found[0].device)
        if self.target == "places":
            lowest = torch.finfo(torch.float32).min
            return torch.cat([values.float().masked_fill(~tokens, lowest) for values in found])
        values = found[0][tokens] if self.each == "token" else found[0]
        if self.target == "labels":
            return torch.stack([values, torch.zeros_like(values)], dim=-1).flatten(0, 1)
        return values

    def why_not(self, teacher: "Predictions | None") -> str | None:
        """Why these cannot be compared with a teacher's; None where they can."""
        if teacher is None:
            return "the teacher has no head, so it predicts nothing"
        if self.target == "unknown" or teacher.target == "unknown":
            return self.reason or teacher.reason
        if (self.target, self.each, self.outputs) != (teacher.target, teacher.each, teacher.outputs):
            return f"the student predicts {self}, its teacher {teacher}"
        if self.size != teacher.size:
            return f"the student predicts {self.size} {self.target}, its teacher {teacher.size}"
        if self.names != teacher.names and set(self.names) == set(teacher.names):
            return (
                f"the student's {self.target} are {', '.join(self.names)}, in this order, its teacher's "
                f"{', '.join(teacher.names)}"
            )
        return None

    def __str__(self) -> str:
        return f"{self.target} of each {self.each}"


def predictions_of(model: PreTrainedModel) -> Predictions | None:
    """What `model` predicts, by its class and config; None for a model that ends in hidden states."""
    for cls in type(model).__mro__:
        found = _by_class(cls.__name__, model)
        if found is not None:
            return found
    if model.base_model is model:
        return None
    return Predictions("unknown", reason=f"makd does not know what a {type(model).__name__} predicts")


def _by_class(name: str, model: PreTrainedModel) -> Predictions | None:
    if name in _LANGUAGE_NAMES or name.endswith(_LANGUAGE):
        return Predictions("classes", "token", label_shift=_label_shift(name, model))
    if name.endswith(("ForQuestionAnswering", "ForQuestionAnsweringSimple")):
        return Predictions("places", "row", ("start_logits", "end_logits"))
    if name.endswith("ForNextSentencePrediction"):
        return Predictions("classes", "row", size=2)
    if name == "ElectraForPreTraining":
        return Predictions("labels", "token", size=1)
    if name.endswith(("ForSequenceClassification", "ForTokenClassification")):
        return _labelled(name, model)
    return None


def _label_shift(name: str, model: PreTrainedModel) -> int:
    """Every head over a vocabulary continues what it reads, but for those that fill gaps or have a decoder's input."""
    fills_gaps = name.endswith("ForMaskedLM") or name in _MASKED_NAMES
    return int(not fills_gaps and not model.config.is_encoder_decoder)


def _labelled(name: str, model: PreTrainedModel) -> Predictions:
    """A head over labels, whose number and meaning stand in the config."""
    config = model.config
    size, kind = int(config.num_labels or 0), getattr(config, "problem_type", None)
    called: dict[Any, Any] = config.id2label or {}
    names = tuple(str(called.get(place, "")) for place in range(size))
    if name.endswith("ForTokenClassification"):
        if kind not in (None, "single_label_classification"):
            return Predictions(
                "unknown", "token", reason=f"the problem_type {kind!r} says nothing about a {type(model).__name__}"
            )
        return Predictions("numbers" if size == 1 else "classes", "token", size=size, names=names)
    if kind is None:  # as transformers takes it
        return Predictions("numbers" if size == 1 else "classes", size=size, names=names)
    if kind not in _ROW_TARGETS:
        known = ", ".join(_ROW_TARGETS)
        return Predictions("unknown", reason=f"its problem_type is {kind!r}, which is none of {known}")
    target = _ROW_TARGETS[kind]
    return Predictions("numbers" if target == "classes" and size == 1 else target, size=size, names=names)


@torch.no_grad()
def check_predictions(model: PreTrainedModel) -> None:
    """Refuse, before hours of work, a `model` that does not predict what its class says; six tokens are enough.

    Heads over a vocabulary are not tried: see `makd.capture.why_not_repeated`.

    Raises:
        UnsupportedModelError: nobody knows what it predicts, or its output is not what its class says.
    """
    predictions = predictions_of(model)
    if predictions is None:
        return
    if predictions.target == "unknown":
        raise UnsupportedModelError(
            f"The predictions of {type(model).__name__} can be neither taught nor measured: {predictions.reason}. Load "
            "the model under a head that is known, with recipe.head: base, masked_lm, causal_lm, seq2seq_lm, "
            "sequence_classification, token_classification or question_answering."
        )
    if predictions.each == "token" and predictions.size is None:
        return
    tokens = torch.arange(1, 7, device=model.device)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder and predictions.each == "token":
        inputs["decoder_input_ids"] = tokens
    with in_eval(model):
        predictions.read(model(**inputs))
