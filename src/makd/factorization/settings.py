"""Station 3: the settings of a factorization."""

from dataclasses import dataclass, replace

from makd.anatomy import Anatomy
from makd.calibration.store import check_choice
from makd.errors import SettingError, UnsupportedModelError
from makd.factorization.outline import VOCABULARY_CHOICES
from makd.kinds import checked
from makd.ranks.allocation import RANK_RULES
from makd.ranks.sharing import SHARE_INPUT_CHOICES
from makd.registry import unknown_name
from makd.solvers import SOLVERS

EXPERT_CHOICES = ("auto", "factored", "dense")
LARGEST_MULTIPLE = 1024
"""Of `rank_multiple`: larger than any tile of a machine's; what is beyond no rank is rounded to."""


@dataclass(frozen=True, kw_only=True)
@checked("factorize")
class FactorizeConfig:
    """How the student's factors and ranks are found."""

    solver: str = "auto"
    """One of `makd.solvers.SOLVERS`. `auto` is the best that the model allows: `two_sided_regression`, or
    `two_sided` where layers cannot be fitted one after the other (two stacks, shared layers, what a trial found)."""
    ranks: str = "auto"
    """How the budget is spread over the linears; one of `makd.ranks.allocation.RANK_RULES`. `auto` is `global` for
    solvers that measure all linears in one unit, and `uniform` for others."""
    rank_multiple: int | None = None
    """What every rank is a multiple of, as hardware and quantized groups want it; what the budget has beyond that is
    given up, and a linear that is too small for it stays dense. None: multiples of 8 as far as the budget allows."""
    share_input: str = "auto"
    """Whether linears that read the same input (Q, K, V; gate and up; K and V of cross-attention) share one A: `never`,
    `always`, or `auto`, for each group what loses less by the predicted error, at the same budget."""
    experts: str = "auto"
    """Whether routed experts get factors: `factored`, `dense`, or `auto`, which is factored where makd can tell their
    matrices apart, but in a model that is streamed."""
    vocabulary: str = "auto"
    """Whether token embeddings and LM head get factors: `dense`, `factored`, or `auto`, only where a budget of the
    whole model would leave the linears less than `makd.factorization.outline.COMFORT` of their parameters. Where ranks
    are `global`, embeddings that no head shares get a rank for each of four bands of tokens by their frequency."""
    depth: int | str = "auto"
    """How many layers stay: a number, `all`, or `auto`: all, but where `auto` factors the vocabulary, fewer and fewer
    are tried, and the student whose outputs are nearest to the teacher's on the calibration text is taken."""

    store: str = "auto"
    """Where the hidden states of the calibration text are kept while layers are walked through: `memory`, `disk` (of
    the system's folder for temporary files, `TMPDIR`), or `auto`: memory up to 1 GiB."""

    def __post_init__(self) -> None:
        check_choice(self.store)
        if self.solver != "auto" and self.solver not in SOLVERS:
            raise unknown_name("solver", self.solver, ("auto", *SOLVERS))
        RANK_RULES[self.rank_rule]
        if self.rank_multiple is not None and not 1 <= self.rank_multiple <= LARGEST_MULTIPLE:
            raise SettingError(
                f"factorize.rank_multiple is at least 1 and at most {LARGEST_MULTIPLE}; got {self.rank_multiple}."
            )
        if self.share_input not in SHARE_INPUT_CHOICES:
            raise SettingError(f"factorize.share_input is auto, never or always; got {self.share_input!r}.")
        if self.experts not in EXPERT_CHOICES:
            raise SettingError(f"factorize.experts is auto, factored or dense; got {self.experts!r}.")
        if self.vocabulary not in VOCABULARY_CHOICES:
            raise SettingError(f"factorize.vocabulary is auto, dense or factored; got {self.vocabulary!r}.")
        words = isinstance(self.depth, str) and self.depth in ("auto", "all")
        if not words and (not isinstance(self.depth, int) or isinstance(self.depth, bool) or self.depth < 1):
            raise SettingError(
                f"factorize.depth is auto, all, or how many layers stay, at least 1; got {self.depth!r}."
            )

    @property
    def rank_rule(self) -> str:
        """The rule that `ranks` stands for."""
        if self.ranks != "auto":
            return self.ranks
        if self.solver == "auto":
            return "global"
        return "global" if SOLVERS[self.solver].one_unit else "uniform"

    @property
    def by_frequency(self) -> bool:
        """Whether embeddings are cut into bands of tokens by frequency: text tells it, and ranks follow errors."""
        return self.solver != "auto" and SOLVERS[self.solver].needs_text and self.rank_rule == "global"

    def for_model(self, anatomy: Anatomy) -> "FactorizeConfig":
        """These settings with the solver that `auto` stands for on this model.

        Raises:
            UnsupportedModelError: the solver looks at something that the model, as it was tried out, does not show.
        """
        if self.solver != "auto":
            chosen = self
        else:
            one_by_one = not anatomy.is_encoder_decoder and all(layer.call == 0 for layer in anatomy.layers)
            in_order = one_by_one and "in_forward_order" not in anatomy.solvers_off
            chosen = replace(self, solver="two_sided_regression" if in_order else "two_sided")
        kind = SOLVERS[chosen.solver]
        reason = next((why for what, why in anatomy.solvers_off.items() if getattr(kind, what)), None)
        if reason is not None:
            ours = {name: SOLVERS[name] for name in SOLVERS if name in SOLVERS.own}
            usable = [name for name, one in ours.items() if not any(getattr(one, what) for what in anatomy.solvers_off)]
            raise UnsupportedModelError(
                f"Solver {chosen.solver!r} cannot be used on this model: {reason}. These can: {', '.join(usable)}."
            )
        return chosen

    def with_experts(self, anatomy: Anatomy, *, streamed: bool = False) -> Anatomy:
        """The anatomy with the experts' matrices that are to get factors, and no others.

        Raises:
            SettingError: experts are to get factors, and cannot.
        """
        if self.experts == "factored" and (streamed or not anatomy.stacks):
            why = "the model is streamed" if streamed else "the model has none whose matrices makd can tell apart"
            raise SettingError(f"factorize.experts is factored, but {why}. Leave it at auto.")
        return replace(anatomy, stacks=()) if streamed or self.experts == "dense" else anatomy
