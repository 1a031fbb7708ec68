"""Station 5: the table of what a student can mimic. What makd asks about an aspect stands in its row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from makd.anatomy import Role
from makd.extensions import Extensible

Tokens = Literal["all", "first", "completion"]
"""Which real tokens of a batch count."""
Place = Literal["linear", "experts", "hidden", "attention", "embedding", "predictions", "labels"]
Measure = Literal["mse", "cosine", "attention", "relation", "own"]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(student (batch, tokens, channels), teacher likewise, mask (batch, tokens), True at tokens that count) -> a scalar:
the mean over those tokens of how far the student is from the teacher, 0 where they are equal. What stands at other
tokens may be anything, NaN included."""

INSIDE: tuple[Place, ...] = ("linear", "experts", "hidden", "attention")
"""Places that every layer has one of; the others are of a whole model's outputs."""
OF_HEAD: tuple[Place, ...] = ("predictions", "labels")
"""Places behind a model's head."""

_OF_PLACE: dict[Place, tuple[str, ...]] = {
    **dict.fromkeys(INSIDE, ("layers", "teacher_layers")),
    "linear": ("layers", "teacher_layers", "roles"),
    "embedding": ("pooling",),
    "predictions": ("temperature", "divergence", "beta", "alpha", "k"),
    "labels": (),
}
"""Settings of a term that all aspects of a place have."""


@dataclass(frozen=True)
class Aspect:
    """Something that a student can mimic."""

    summary: str
    """What is compared, how, and the unit of its loss."""
    at: Place
    """What it compares: layer by layer, the outputs of linears, by role; of a mixture of experts; a layer's output;
    attention distributions. Or of a whole model the embeddings of texts, predictions, or these with labels."""
    measure: Measure = "own"
    """How two tensors inside a layer are compared: by `mse`, or as the term's `distance` says; as distributions of
    attention; by relations; or by `loss`. Nothing is asked of it elsewhere."""
    settings: tuple[str, ...] = ()
    """Settings of a term that it has, beside its place's."""
    roles: tuple[str, ...] = tuple(role.value for role in Role)
    """Of linears, which."""
    tokens: tuple[Tokens, ...] = ("all", "first", "completion")
    """Which real tokens it can count."""
    loss: Loss | None = None
    """Of a user's aspect."""

    @property
    def has(self) -> tuple[str, ...]:
        """Settings of a term that do something with it, beside `aspect`, `weight` and `tokens`."""
        return _OF_PLACE[self.at] + self.settings


def why_not(name: str, aspect: Aspect) -> str | None:
    """What is wrong with a user's aspect."""
    if aspect.at not in ("linear", "hidden"):
        return f"its `at` is 'linear' or 'hidden'; got {aspect.at!r}"
    if aspect.measure != "own" or aspect.settings:
        return "it has a `loss`, and neither a `measure` nor `settings`, which are of makd's own"
    return None if callable(aspect.loss) else "its `loss` is no function"


ASPECTS: Extensible[Aspect] = Extensible(
    "aspect",
    {
        "matrix": Aspect(
            "outputs of the linears inside a layer: mean squared difference, in units of the teacher's variance",
            at="linear",
            measure="mse",
            settings=("distance",),
        ),
        "experts": Aspect(
            "the output of a layer's mixture of experts, shared ones included: the same",
            at="experts",
            measure="mse",
            settings=("distance",),
        ),
        "hidden": Aspect("a layer's output: the same", at="hidden", measure="mse", settings=("distance",)),
        "attention": Aspect(
            "self- and cross-attention distributions: KL(teacher ‖ student) per head and query, in nats",
            at="attention",
            measure="attention",
            tokens=("all", "completion"),
        ),
        "relation": Aspect(
            "similarities between a text's tokens, of queries, keys or values: KL(teacher ‖ student), in nats",
            at="linear",
            measure="relation",
            settings=("relation_heads",),
            roles=("q", "k", "v"),  # MiniLMv2's three
            tokens=("all", "completion"),
        ),
        "embedding": Aspect("the pooled embedding of a whole text: 1 - cosine", at="embedding", tokens=("all",)),
        "similarity": Aspect(
            "cosines between the texts of a batch: mean squared difference", at="embedding", tokens=("all",)
        ),
        "logits": Aspect(
            "predictions: a divergence · temperature², in nats; regression: squared difference",
            at="predictions",
            tokens=("all", "completion"),
        ),
        "task": Aspect("the task's own loss, where the batch has labels", at="labels", tokens=("all",)),
    },
    group="makd.aspects",
    accepts=Aspect,
    why_not=why_not,
)
"""What a student can mimic: makd's own, and those of users' packages: entry points of the group `makd.aspects`."""

SETTINGS: tuple[str, ...] = tuple(dict.fromkeys(name for aspect in ASPECTS.own for name in ASPECTS[aspect].has))
"""Settings of a term that some aspects have."""
