"""Station 5: a plan fitted to the models that it is carried out on.

Layer indices instead of words, the tensors to capture on either side, and a reason for every term of a preset that the
model cannot offer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from makd.anatomy import Anatomy, Layer, Role
from makd.aspects.completions import Completions
from makd.aspects.layers import select_layers, spread_layers
from makd.aspects.plan import Plan, Term
from makd.aspects.table import ASPECTS, INSIDE, Measure, Place, Tokens
from makd.capture import Kind, Tap
from makd.errors import SettingError
from makd.sentence_encoder import SentenceEncoder, encoder_of


@dataclass(frozen=True)
class Comparison:
    """What a term compares at one place, and how. Two terms that compare alike have equal ones."""

    tap: Tap
    """The student's tensor."""
    teacher: Tap
    """The teacher's: the same of a layer that may be another."""
    measure: Measure
    tokens: Tokens = "all"
    """Which of the real tokens count; of attention and relations, as queries."""
    heads: int = 1
    """Parts of the channels, with measure "relation"."""
    aspect: str = ""
    """Name of the user's aspect whose loss it is, with measure "own"."""


@dataclass(frozen=True)
class ActiveTerm:
    """A term with the tensors that it compares."""

    name: str
    """What its loss is logged as: the aspect, numbered from the second term of the same aspect on."""
    term: Term
    comparisons: tuple[Comparison, ...]
    encoder: SentenceEncoder | None = None
    """How the embeddings are made, with `embedding` and `similarity`; the term's pooling is its own."""

    @property
    def place(self) -> Place:
        """Where its aspect compares."""
        return self.term.place

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The student's tensors."""
        return tuple(comparison.tap for comparison in self.comparisons)

    @property
    def teacher_taps(self) -> tuple[Tap, ...]:
        """The teacher's."""
        return tuple(comparison.teacher for comparison in self.comparisons)


@dataclass(frozen=True)
class ActivePlan:
    """A plan fitted to a model, or to a student and a teacher of another size."""

    terms: tuple[ActiveTerm, ...]
    off: Mapping[str, str] = field(default_factory=dict)
    """Aspects of a preset that are left out, and why."""
    completions: Completions = field(default_factory=Completions)
    """Whose completions are learned from."""

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """What is compared inside the layers, each once."""
        return tuple(dict.fromkeys(comparison for active in self.terms for comparison in active.comparisons))

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Every tensor of the student that any term asks for, once."""
        return tuple(dict.fromkeys(comparison.tap for comparison in self.comparisons))

    @property
    def teacher_taps(self) -> tuple[Tap, ...]:
        """Every tensor of the teacher, once. Of a teacher with the student's layers: `taps`."""
        return tuple(dict.fromkeys(comparison.teacher for comparison in self.comparisons))

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is mimicked. Not with `task` alone, which is plain fine-tuning."""
        return any(active.place != "labels" for active in self.terms)


def activate(plan: Plan, anatomy: Anatomy, teacher: Anatomy | None = None) -> ActivePlan:
    """Fit `plan` to a model.

    Args:
        plan: what is to be mimicked.
        anatomy: of the student.
        teacher: anatomy of the teacher; None: the same layers.

    Raises:
        SettingError: a term of a plan of one's own does not apply, a layer does not exist, or nothing is left. Layers
            that a student has dropped are left out of every term; a term that has no others is off, with a reason.
    """
    active: list[ActiveTerm] = []
    off: dict[str, str] = {}
    for term in plan.wanted:
        reason = _why_off(term, anatomy, teacher or anatomy)
        found = () if reason else tuple(_comparisons(term, anatomy, teacher or anatomy))
        dropped = not reason and not found and _is_dropped(term, anatomy)
        if dropped:
            reason = "the chosen layers are dropped in this student"
        elif not reason and not found and term.place in INSIDE:
            reason = "none of the chosen layers has it"
        if reason and plan.terms and not dropped:
            raise SettingError(f"The plan asks for {term.aspect!r}, but {reason}. Take the term out of the plan.")
        if reason:
            off[term.aspect] = reason
        else:
            before = sum(item.term.aspect == term.aspect for item in active)
            name = term.aspect if before == 0 else f"{term.aspect}_{before + 1}"
            active.append(_active(name, term, found, teacher or anatomy))
    mimics = any(term.place != "labels" for term in plan.wanted)
    if not plan.terms and (not active or (mimics and all(item.place == "labels" for item in active))):
        raise SettingError(
            "The plan has no aspect to mimic on this model: " + "; ".join(f"{name}: {why}" for name, why in off.items())
        )
    counted = {item.term.tokens for item in active if item.place == "predictions"}
    if len(counted) > 1:
        raise SettingError(
            f"The plan's terms of 'logits' count different tokens ({', '.join(sorted(counted))}), and a model's "
            "predictions are compared in one pass. Let all of them count the same."
        )
    return ActivePlan(tuple(active), off, plan.writers)


def _active(name: str, term: Term, comparisons: tuple[Comparison, ...], teacher: Anatomy) -> ActiveTerm:
    if term.place != "embedding":
        return ActiveTerm(name, term, comparisons)
    encoder = encoder_of(teacher.origin, term.pooling)
    return ActiveTerm(name, replace(term, pooling=encoder.pooling), comparisons, encoder)


def _why_off(term: Term, anatomy: Anatomy, teacher: Anatomy) -> str | None:
    """Why one of the models cannot offer the term's aspect; None when both can."""
    for one in (anatomy, teacher):
        if term.aspect in one.off:
            return one.off[term.aspect]
    if term.place == "predictions":
        if anatomy.predictions is None:
            return "the model has no head, so it predicts nothing"
        return anatomy.predictions.why_not(teacher.predictions)
    if term.place == "labels" and anatomy.head is None:
        return "the model has no head, so it has no task"
    if term.tokens == "completion" and not _tells_completions(term, anatomy):
        return "completions are what a causal language model continues, and the model is none"
    if term.place == "embedding" and (anatomy.head or anatomy.predictions) is not None:
        return "the model has a head, so its predictions are mimicked instead of an embedding"
    return None


def _tells_completions(term: Term, anatomy: Anatomy) -> bool:
    """Whether a batch says which tokens are completions: what an encoder-decoder predicts all is."""
    if anatomy.is_encoder_decoder:
        return term.place == "predictions" and anatomy.predictions is not None
    return anatomy.predictions is not None and anatomy.predictions.label_shift > 0


def _comparisons(term: Term, anatomy: Anatomy, teacher: Anatomy) -> Iterable[Comparison]:
    if term.place not in INSIDE:
        return
    for index, other in _pairs(term, len(anatomy.layers), len(teacher.layers)):
        layer = anatomy.layers[index]
        if layer.is_skipped:
            continue
        for kind, role in _places(term, layer, anatomy):
            there = teacher.layers[other]
            if kind == "experts" and teacher.mixture_of(there) is None:
                raise SettingError(
                    f"The plan compares the experts of the student's layer {index} with the teacher's {other}, which "
                    "has none. Choose other layers."
                )
            if role is not None and role not in there.roles:
                raise SettingError(
                    f"The plan compares {role.value!r} of the student's layer {index} with the teacher's {other}, "
                    f"which has {', '.join(found.value for found in there.roles) or 'nothing'}. Choose other roles."
                )
            yield _comparison(term, Tap(index, kind, role), Tap(other, kind, role))


def _comparison(term: Term, ours: Tap, theirs: Tap) -> Comparison:
    """How the term compares the student's tensor with the teacher's."""
    measure = ASPECTS[term.aspect].measure
    if measure == "attention":
        return Comparison(ours, theirs, measure, term.tokens)
    if measure == "relation":
        return Comparison(ours, theirs, measure, term.tokens, term.relation_heads)
    if measure == "own":
        return Comparison(ours, theirs, measure, term.tokens, aspect=term.aspect)
    return Comparison(ours, theirs, term.distance, term.tokens)


def _pairs(term: Term, count: int, teacher_count: int) -> Iterable[tuple[int, int]]:
    """Layers of the student with those of the teacher that they mimic."""
    chosen = select_layers(term.layers, count)
    if term.teacher_layers is None:
        spread = spread_layers(count, teacher_count)
        return [(index, spread[index]) for index in chosen]
    for index in term.teacher_layers:
        select_layers([index], teacher_count)  # says so where it does not exist
    if not isinstance(term.layers, str) and [index % count for index in term.layers] != chosen:
        raise SettingError(
            f"A term's teacher_layers stand beside its layers in ascending order, each once; layers are {term.layers}. "
            f"Write them as {chosen}, and teacher_layers in that order."
        )
    if len(term.teacher_layers) != len(chosen):
        raise SettingError(
            f"A term's teacher_layers has one layer for each of `layers`, which are {len(chosen)} here "
            f"({', '.join(map(str, chosen))}); got {len(term.teacher_layers)}."
        )
    return [(ours, theirs % teacher_count) for ours, theirs in zip(chosen, term.teacher_layers, strict=True)]


def _places(term: Term, layer: Layer, anatomy: Anatomy) -> Iterable[tuple[Kind, Role | None]]:
    """Where in a layer the term looks."""
    if term.place == "hidden":
        yield "hidden", None
    elif term.place == "experts":
        if anatomy.mixture_of(layer) is not None:
            yield "experts", None
    elif term.place == "attention":
        if layer.attention is not None:
            yield "attention", None
        if layer.cross_attention is not None:
            yield "cross_attention", None
    else:
        able = ASPECTS[term.aspect].roles
        yield from (("linear", role) for role in _roles(term, layer) if role.base.value in able)


def _is_dropped(term: Term, anatomy: Anatomy) -> bool:
    """Whether the term means layers, and the student has none of them."""
    if term.place not in INSIDE:
        return False
    return all(anatomy.layers[index].is_skipped for index in select_layers(term.layers, len(anatomy.layers)))


def _roles(term: Term, layer: Layer) -> Iterable[Role]:
    return (role for role in layer.roles if role.value in term.roles or role.base.value in term.roles)
