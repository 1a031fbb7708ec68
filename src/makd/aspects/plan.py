"""Station 5, the table of the method: which aspects act at which layers, with which weight.

A `Plan` is what a person writes (a preset's name, or terms); `activate` fits it to a model: layer indices instead of
words, the tensors to capture, and a reason for every term of a preset that the model cannot offer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from makd.anatomy import Anatomy, Layer, Role
from makd.aspects.divergences import Divergence, divergence
from makd.aspects.layers import select_layers
from makd.capture import Tap
from makd.errors import SettingError
from makd.registry import Registry, unknown_name

ASPECTS: Registry[str] = Registry(
    "aspect",
    {
        "matrix": "outputs of the linears inside a layer: mean squared difference, in units of the teacher's variance",
        "hidden": "a layer's output: the same",
        "attention": "self- and cross-attention distributions: KL(teacher ‖ student) per head and query, in nats",
        "embedding": "the pooled embedding of a whole text: 1 - cosine",
        "similarity": "cosines between the texts of a batch: mean squared difference",
        "logits": "predictions: a divergence · temperature², in nats; regression: squared difference",
        "task": "the task's own loss, where the batch has labels",
    },
)
"""What a student can mimic, and the unit of its loss."""

PER_LAYER = ("matrix", "hidden", "attention")
"""Aspects that are compared layer by layer."""

PAPER_ROLES = ("q", "k", "v", "up", "down")
"""Linears of the paper's matrix distillation: MHA mappings and FFN vectors."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One aspect at some layers."""

    aspect: str
    """One of `ASPECTS`."""
    weight: float = 1.0
    """Factor of the aspect's loss (a mean over its layers and roles) in the sum; above 0."""
    layers: str | list[int] = "all"
    """`all`; `last`; `last:3`, the last three; `every:2`, each second one, ending with the last; or indices, negative
    ones from the end. In an encoder-decoder the decoder's follow the encoder's."""
    roles: tuple[str, ...] = PAPER_ROLES
    """Which linears, with `matrix`: of q, k, v, o, gate, up, down (and cross_q, cross_k, ...). A role of self-attention
    stands for the one of cross-attention too."""
    temperature: float = 1.0
    """With `logits`: both sides' logits are divided by it, and the loss multiplied by its square."""
    divergence: str = "forward_kl"
    """With `logits`: how predictions are compared, one of `DIVERGENCES`."""
    beta: float = 0.5
    """With divergence `jsd`: the teacher's share of the mixture, in (0, 1); towards 0 it is like `forward_kl`."""
    alpha: float = 0.1
    """With the skew divergences: share of the first distribution that is mixed into the second, in [0, 1)."""
    k: int = 64
    """With divergence `top_k`: how many of the teacher's likeliest tokens are told apart, at least 1."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """With `embedding` and `similarity`: how a text's embedding is made from its hidden states."""

    def __post_init__(self) -> None:
        ASPECTS[self.aspect]
        if not self.weight > 0:
            raise SettingError(f"A term's weight is above 0; got {self.weight} for {self.aspect}. Leave out the term.")
        if not self.temperature > 0:
            raise SettingError(f"A temperature is above 0; got {self.temperature}.")
        try:
            divergence(self.divergence, beta=self.beta, alpha=self.alpha, k=self.k)
        except ValueError as error:
            raise SettingError(str(error)) from error
        known = [role.value for role in Role]
        for role in self.roles:
            if role not in known:
                raise unknown_name("role", role, known)
        if self.aspect == "matrix" and not self.roles:
            raise SettingError(f"A matrix term needs at least one role of {', '.join(known)}.")
        select_layers(self.layers, 10**6)  # its grammar does not depend on the number of layers

    def compare(self) -> Divergence:
        """The term's divergence, with its setting."""
        return divergence(self.divergence, beta=self.beta, alpha=self.alpha, k=self.k)


PRESETS: Registry[tuple[Term, ...]] = Registry(
    "plan",
    {
        # Fig. 1a of the paper: predictions only
        "logits": (Term(aspect="logits"), Term(aspect="embedding", weight=10.0), Term(aspect="task")),
        # Fig. 1b: hidden states and attention
        "feature": (
            Term(aspect="hidden"),
            Term(aspect="attention"),
            Term(aspect="logits"),
            Term(aspect="embedding", weight=10.0),
            Term(aspect="task"),
        ),
        # Fig. 1c: every aspect at every layer
        "full": (
            Term(aspect="matrix"),
            Term(aspect="hidden"),
            Term(aspect="attention"),
            Term(aspect="logits"),
            Term(aspect="embedding", weight=10.0),
            Term(aspect="task"),
        ),
        # every layer's state and each second layer's matrices: most of `full` for less of its cost
        "balanced": (
            Term(aspect="matrix", layers="every:2"),
            Term(aspect="hidden"),
            Term(aspect="attention", layers="every:2"),
            Term(aspect="logits"),
            Term(aspect="embedding", weight=10.0),
            Term(aspect="task"),
        ),
        # what costs next to nothing besides the forward
        "fast": (
            Term(aspect="hidden", layers="every:2"),
            Term(aspect="logits"),
            Term(aspect="embedding", weight=10.0),
            Term(aspect="task"),
        ),
    },
)
"""Plans by name. A term that does not apply to a model (logits without a head) is left out and said so."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Aspects, layers and weights: a table."""

    preset: str = "full"
    """One of `PRESETS`: `logits`, `feature`, `full`, `balanced`, `fast`. Not looked at when `terms` are given."""
    terms: tuple[Term, ...] = ()
    """A plan of one's own. Unlike a preset's, a term that does not apply to the model is an error."""

    def __post_init__(self) -> None:
        if not self.terms:
            PRESETS[self.preset]


@dataclass(frozen=True)
class ActiveTerm:
    """A term with the tensors that it compares."""

    name: str
    """What its loss is logged as: the aspect, numbered from the second term of the same aspect on."""
    term: Term
    taps: tuple[Tap, ...]


@dataclass(frozen=True)
class ActivePlan:
    """A plan fitted to a model."""

    terms: tuple[ActiveTerm, ...]
    off: Mapping[str, str] = field(default_factory=dict)
    """Aspects of a preset that are left out, and why."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Every tensor that any term asks for, once."""
        return tuple(dict.fromkeys(tap for active in self.terms for tap in active.taps))


def activate(plan: Plan, anatomy: Anatomy) -> ActivePlan:
    """Fit `plan` to a model.

    Raises:
        SettingError: a term of a plan of one's own does not apply, a layer does not exist, or nothing is left. Layers
            that a student has dropped are left out of every term; a term that has no others is off, with a reason.
    """
    active: list[ActiveTerm] = []
    off: dict[str, str] = {}
    for term in plan.terms or PRESETS[plan.preset]:
        reason = _why_off(term, anatomy)
        taps = () if reason else tuple(_taps(term, anatomy))
        dropped = not reason and not taps and _is_dropped(term, anatomy)
        if dropped:
            reason = "the chosen layers are dropped in this student"
        elif not reason and not taps and term.aspect in PER_LAYER:
            reason = "none of the chosen layers has it"
        if reason and plan.terms and not dropped:
            raise SettingError(f"The plan asks for {term.aspect!r}, but {reason}. Take the term out of the plan.")
        if reason:
            off[term.aspect] = reason
        else:
            before = sum(item.term.aspect == term.aspect for item in active)
            name = term.aspect if before == 0 else f"{term.aspect}_{before + 1}"
            active.append(ActiveTerm(name, term, taps))
    if all(item.term.aspect == "task" for item in active):
        raise SettingError(
            "The plan has no aspect to mimic on this model: " + "; ".join(f"{name}: {why}" for name, why in off.items())
        )
    return ActivePlan(tuple(active), off)


def _why_off(term: Term, anatomy: Anatomy) -> str | None:
    """Why the model cannot offer the term's aspect; None when it can."""
    if term.aspect in anatomy.off:
        return anatomy.off[term.aspect]
    if term.aspect == "logits" and anatomy.head is None:
        return "the model has no head, so it predicts nothing"
    if term.aspect == "task" and anatomy.head is None:
        return "the model has no head, so it has no task"
    if term.aspect in ("embedding", "similarity") and anatomy.head is not None:
        return "the model has a head, so its predictions are mimicked instead of an embedding"
    return None


def _taps(term: Term, anatomy: Anatomy) -> Iterable[Tap]:
    if term.aspect not in PER_LAYER:
        return
    for index in select_layers(term.layers, len(anatomy.layers)):
        layer = anatomy.layers[index]
        if layer.is_skipped:
            continue
        if term.aspect == "hidden":
            yield Tap(index, "hidden")
        elif term.aspect == "matrix":
            yield from (Tap(index, "linear", role) for role in _roles(term, layer))
        else:
            if layer.attention is not None:
                yield Tap(index, "attention")
            if layer.cross_attention is not None:
                yield Tap(index, "cross_attention")


def _is_dropped(term: Term, anatomy: Anatomy) -> bool:
    """Whether the term means layers, and the student has none of them."""
    if term.aspect not in PER_LAYER:
        return False
    return all(anatomy.layers[index].is_skipped for index in select_layers(term.layers, len(anatomy.layers)))


def _roles(term: Term, layer: Layer) -> Iterable[Role]:
    return (role for role in layer.roles if role.value in term.roles or role.base.value in term.roles)
