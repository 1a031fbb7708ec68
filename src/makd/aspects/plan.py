"""Station 5, the table of the method: which aspects act at which layers, with which weight.

A `Plan` is what a person writes: a preset's name, or terms. `makd.aspects.active_plan` fits it to a model.
"""

from dataclasses import dataclass, field
from typing import Literal

from makd.anatomy import Role
from makd.aspects.completions import Completions
from makd.aspects.divergences import DIVERGENCES, Divergence, divergence
from makd.aspects.layers import select_layers
from makd.aspects.table import ASPECTS, SETTINGS, Place, Tokens
from makd.errors import SettingError
from makd.kinds import checked
from makd.registry import Registry, unknown_name
from makd.sentence_encoder import AUTO, check_pooling

PAPER_ROLES = ("q", "k", "v", "up", "down")
"""Linears of the paper's matrix distillation: MHA mappings and FFN vectors."""


@dataclass(frozen=True, kw_only=True)
@checked("plan.terms[]")
class Term:
    """One aspect at some layers."""

    aspect: str
    """One of `ASPECTS`."""
    weight: float = 1.0
    """Factor of the aspect's loss (a mean over its layers and roles) in the sum; above 0."""
    layers: str | list[int] = "all"
    """`all`; `last`; `last:3`, the last three; `every:2`, each second one, ending with the last; or indices, negative
    ones from the end. In an encoder-decoder the decoder's follow the encoder's. They are the student's."""
    teacher_layers: list[int] | None = None
    """The teacher's layers that `layers`, in ascending order, mimic; negative ones count from the end. None is
    the same ones, or, where the teacher has more or fewer, the last of each of as many parts as the student has."""
    roles: tuple[str, ...] = PAPER_ROLES
    """Which linears, with `matrix` and users' aspects of linears: of q, k, v, o, gate, up, down (and cross_q, cross_k,
    ..., q_latent, kv_latent). A role of self-attention stands for the one of cross-attention too. With `relation`: of
    these, q, k and v."""
    distance: Literal["mse", "cosine"] = "mse"
    """With `matrix`, `experts` and `hidden`: squared difference in units of the teacher's variance, or 1 - cosine of
    tokens."""
    tokens: Tokens = "all"
    """Which real tokens count. `first`, with `matrix`, `experts`, `hidden` and users' aspects: each text's first (its
    [CLS]). `completion`, with `logits` and all inside the layers: those of completions, whose predictions `logits`
    compares, and which `attention` and `relation` compare as queries. `task` goes by the labels in any case."""
    relation_heads: int = 12
    """With `relation`: parts that q, k and v are cut into, on both sides; has to divide the width of either."""
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
    pooling: str = AUTO
    """With `embedding` and `similarity`: how a text's vector is made from its hidden states: `auto`, which is what the
    teacher's sentence-transformers folder says, or `mean` where it has none; or one of `POOLINGS`, or several joined by
    `+`."""

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
        able = ASPECTS[self.aspect].roles
        if self.place == "linear" and not set(self.roles) & set(able):
            raise SettingError(
                f"A {self.aspect} term needs at least one role of {', '.join(able)}; got "
                f"{', '.join(self.roles) or 'none'}."
            )
        self._check_settings()
        # its grammar does not depend on the number of layers, and words name as many as there are
        select_layers(self.layers, 1 if isinstance(self.layers, str) else 10**6)

    def _check_settings(self) -> None:
        """Refuse settings that the aspect or the divergence does not have: they would do nothing."""
        aspect = ASPECTS[self.aspect]
        if self.tokens not in aspect.tokens:
            able = (name for name in ASPECTS.own if self.tokens in ASPECTS[name].tokens)
            raise SettingError(
                f"With tokens {self.tokens!r} these aspects can be compared: {', '.join(able)}; got "
                f"{self.aspect!r}. Leave tokens at all."
            )
        for name in SETTINGS:
            if name not in aspect.has and getattr(self, name) != getattr(Term, name, None):
                having = ", ".join(own for own in ASPECTS.own if name in ASPECTS[own].has)
                raise SettingError(
                    f"A term's {name} is of {having}, and does nothing with {self.aspect}; got "
                    f"{getattr(self, name)!r}. Leave it out."
                )
        own = DIVERGENCES[self.divergence].setting
        for name in {kind.setting for kind in DIVERGENCES.values() if kind.setting is not None} - {own}:
            if getattr(self, name) != getattr(Term, name):
                having = ", ".join(known for known, kind in DIVERGENCES.items() if kind.setting == name)
                raise SettingError(
                    f"A term's {name} is of the divergence {having}, and does nothing with {self.divergence}; got "
                    f"{getattr(self, name)!r}. Leave it out, or take that divergence."
                )
        check_pooling(self.pooling, "A term's pooling")
        if self.relation_heads < 1:
            raise SettingError(f"A term's relation_heads is at least 1; got {self.relation_heads}.")

    @property
    def place(self) -> Place:
        """Where its aspect compares."""
        return ASPECTS[self.aspect].at

    def compare(self) -> Divergence:
        """The term's divergence, with its setting."""
        return divergence(self.divergence, beta=self.beta, alpha=self.alpha, k=self.k)


@dataclass(frozen=True)
class Preset:
    """A plan that has a name."""

    terms: tuple[Term, ...]
    completions: Completions = field(default_factory=Completions)


PRESETS: Registry[Preset] = Registry(
    "plan",
    {
        # Fig. 1a of the paper: predictions only
        "logits": Preset((Term(aspect="logits"), Term(aspect="embedding", weight=10.0), Term(aspect="task"))),
        # Fig. 1b: hidden states and attention
        "feature": Preset(
            (
                Term(aspect="hidden"),
                Term(aspect="attention"),
                Term(aspect="logits"),
                Term(aspect="embedding", weight=10.0),
                Term(aspect="task"),
            )
        ),
        # Fig. 1c: every aspect at every layer
        "full": Preset(
            (
                Term(aspect="matrix"),
                Term(aspect="hidden"),
                Term(aspect="attention"),
                Term(aspect="logits"),
                Term(aspect="embedding", weight=10.0),
                Term(aspect="task"),
            )
        ),
        # every layer's state and each second layer's matrices: most of `full` for less of its cost
        "balanced": Preset(
            (
                Term(aspect="matrix", layers="every:2"),
                Term(aspect="hidden"),
                Term(aspect="attention", layers="every:2"),
                Term(aspect="logits"),
                Term(aspect="embedding", weight=10.0),
                Term(aspect="task"),
            )
        ),
        # what costs next to nothing besides the forward
        "fast": Preset(
            (
                Term(aspect="hidden", layers="every:2"),
                Term(aspect="logits"),
                Term(aspect="embedding", weight=10.0),
                Term(aspect="task"),
            )
        ),
        # the labels alone: supervised fine-tuning
        "sft": Preset((Term(aspect="task"),)),
        # Hinton et al., arXiv 1503.02531, token by token, with the labels
        "kd": Preset((Term(aspect="logits", tokens="completion"), Term(aspect="task"))),
        # Kim & Rush, arXiv 1606.07947: fine-tuning on what the teacher writes
        "seq_kd": Preset((Term(aspect="task"),), Completions(teacher_share=1.0)),
        # MiniLLM, arXiv 2306.08543: its loss of single steps, on what the student writes
        "minillm": Preset(
            (Term(aspect="logits", tokens="completion", divergence="reverse_kl"),), Completions(student_share=1.0)
        ),
        # GKD, arXiv 2306.13649
        "gkd": Preset((Term(aspect="logits", tokens="completion", divergence="jsd"),), Completions(student_share=0.5)),
        # DistiLLM, arXiv 2402.03898
        "distillm": Preset(
            (Term(aspect="logits", tokens="completion", divergence="skew_reverse_kl"),),
            Completions(adaptive=True, replay=1000),
        ),
    },
)
"""Plans by name. A term that does not apply to a model (logits without a head) is left out and said so."""


@dataclass(frozen=True, kw_only=True)
@checked("plan")
class Plan:
    """Aspects, layers and weights: a table."""

    preset: str = "full"
    """One of `PRESETS`: `logits`, `feature`, `full`, `balanced`, `fast`; and of causal language models `sft`, `kd`,
    `seq_kd`, `minillm`, `gkd`, `distillm`."""
    terms: tuple[Term, ...] = ()
    """A plan of one's own, in the place of the preset's. Unlike a preset's, a term that does not apply to the model is
    an error."""
    completions: Completions | None = None
    """Whose completions are learned from; None: the preset's, or the data's where `terms` are given."""

    def __post_init__(self) -> None:
        if not self.terms:
            own = PRESETS[self.preset].completions
            if own.written and self.completions is not None and not self.completions.written:
                raise SettingError(
                    f"The preset {self.preset} learns from completions that are written, and plan.completions, which "
                    "stand in the place of its own, have none written. Give student_share or teacher_share, or take "
                    "the preset kd or sft, which learn from the data's."
                )

    @property
    def wanted(self) -> tuple[Term, ...]:
        """The terms that it has, or its preset's."""
        return self.terms or PRESETS[self.preset].terms

    @property
    def writers(self) -> Completions:
        """Whose completions are learned from."""
        if self.completions is not None:
            return self.completions
        return Completions() if self.terms else PRESETS[self.preset].completions
