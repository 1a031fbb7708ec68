"""Station 3: from a text to what is known of a model's linears, by a walk through its layers.

Models whose layers cannot be run one by one (two stacks, shared layers, work between layers) are run whole instead:
the moments of all linears are in memory at once then.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from makd.anatomy import Anatomy, linear_shape
from makd.calibration import entries
from makd.calibration.experts import ExpertMoments
from makd.calibration.gradients import collect_gradient_moments, frozen
from makd.calibration.moments import InputMoments
from makd.calibration.replay import NotLayerByLayer
from makd.calibration.source import LayerSource, ModelSource
from makd.calibration.statistics import collect_input_moments
from makd.calibration.store import DiskStore, Store, choose_store
from makd.calibration.walk import Batches, LayerMoments, Walk, state_bytes
from makd.factorization.layers import TeachLayer
from makd.factorization.outcome import warn_of_little_text
from makd.factorization.outline import Candidates, Outline
from makd.factorization.settings import FactorizeConfig
from makd.factorization.terms import DecompositionRequest, Terms
from makd.factorization.vocabulary import Table, TableTerms, decompose_tables, table_sizes
from makd.factorization.work import Work
from makd.progress import OnProgress, Progress, track
from makd.ranks.allocation import RANK_RULES, LinearSize
from makd.ranks.planning import RankProblem, find_max_ranks
from makd.ranks.sharing import Group, find_sharing
from makd.solvers import SOLVERS, Solver
from makd.solvers.factors import Decomposition

logger = logging.getLogger(__name__)

ROWS_PER_FEATURE = 32
"""Tokens whose gradients are looked at, for each feature of the widest output, where each token has a prediction of
its own. SmolLM2-135M at 0.8 of its linears, gaps to the teacher on two texts in nats: 8 tokens a feature, by chance,
0.201 and 0.294; all 32,768, which are 21 a feature, 0.189 and 0.280."""

OfTables = tuple[Mapping[str, InputMoments], Mapping[str, InputMoments]]
"""Of what the vocabulary's matrices read, and of the gradients at the outputs of embeddings."""


@dataclass(frozen=True)
class FactorizationJob:
    """What one student is made from."""

    source: LayerSource
    """The teacher, without the layers that go."""
    anatomy: Anatomy
    outline: Outline
    candidates: Candidates
    settings: FactorizeConfig
    batches: Batches
    progress: OnProgress
    teach: TeachLayer | None = None
    """Teaches each layer when it has its factors."""
    work: Work | None = None
    """Where to keep what is done, for a process that goes on after this one; None keeps it as long as this lives."""

    @property
    def targets(self) -> bool:
        """Whether layers of the student are fitted or taught to what the teacher's give."""
        return self.kind.in_forward_order or self.teach is not None

    @property
    def kind(self) -> Solver:
        """What the solver looks at."""
        return SOLVERS[self.settings.solver]

    def store_on_disk(self, suffix: str = "") -> DiskStore:
        """A store on disk; students that do without other layers, and those of another solver, have their own."""
        if self.work is None:
            return DiskStore.temporary()
        name = f"{self.settings.solver}-{len(self.anatomy.layers)}{suffix}"  # of all layers, those that are dropped too
        if self.outline.dropped and not suffix:
            name += f"-without-{hashlib.sha256(' '.join(self.outline.dropped).encode()).hexdigest()[:8]}"
        return self.work.store(name)

    @property
    def sizes(self) -> list[LinearSize]:
        """Of everything that gets factors."""
        return self.candidates.parts.sizes(self.outline)

    @property
    def linear_sizes(self) -> list[LinearSize]:
        """Of the linears and stacks of experts alone."""
        return self.sizes[: len(self.sizes) - len(self.candidates.parts.table_sizes(self.outline))]

    @property
    def groups(self) -> tuple[Group, ...]:
        """Linears that may share one A, and experts that may share a factor."""
        return find_sharing(self.anatomy, self.sizes, self.settings.share_input)

    def problem(
        self,
        sensitivities: Mapping[str, float],
        tables: Mapping[str, Decomposition],
        max_ranks: Mapping[str, int] | None,
    ) -> RankProblem:
        """What ranks are looked for."""
        return RankProblem(
            self.sizes,
            self.candidates.allowance(self.outline),
            self.settings.rank_rule,
            self.settings.rank_multiple,
            sensitivities,
            self.settings.share_input,
            tables,
            max_ranks,
        )


@dataclass(frozen=True)
class CalibrationResult:
    """What calibration found."""

    store: Store
    terms: Terms
    tables: TableTerms
    """Of the vocabulary."""
    walk: Walk | None
    """None where the model was run whole, or not at all."""
    seconds: float


def calibrate(job: FactorizationJob, whole: Walk | None = None) -> CalibrationResult:
    """Walk through the teacher and keep what a student is made of.

    Args:
        job: what it is made from.
        whole: the walk through the teacher with all its layers, where some go and the student has `targets`.

    Raises:
        DataError: there are no batches, or they do not reach every linear.
        NumericsError: weights or activations hold NaN or infinity.
        NotLayerByLayer: the model's layers cannot be run one by one, and the solver fits one after the other, or the
            model is not in memory.
    """
    started, kind, model = time.perf_counter(), job.kind, job.source.model
    store = choose_store(job.settings.store, _bytes_kept(job), job.store_on_disk)
    custom = job.settings.solver if job.settings.solver not in SOLVERS.own else ""
    request = DecompositionRequest(kind, job.groups, _max_ranks(job), _wants_spectra(job), custom)
    terms = Terms(store, model, request, job.source.device)
    of, done = len(job.linear_sizes) + len(job.groups), 0

    def on_matrix() -> None:
        nonlocal done
        done += 1
        job.progress(Progress("decompose", done, of, "linears"))

    walk: Walk | None = None
    with frozen(model):
        if not kind.needs_text:
            found = _without_text(job, terms, on_matrix)
        if kind.needs_text or job.targets:
            try:
                walk = Walk(
                    job.source, job.anatomy, job.batches, store,
                    backward_tokens=_backward_tokens(job), whole=whole,
                )  # fmt: skip
                found = _walked(job, walk, terms, on_matrix)
            except NotLayerByLayer as error:
                if job.targets or not isinstance(job.source, ModelSource):
                    raise
                logger.info("The model is run whole, with the moments of all its linears in memory: %s", error)
                walk = None
                for entry in entries.OF_WALK:
                    store.remove(entry)
                found = _whole(job, terms, on_matrix)
    if 0 < done < of:  # some need none: their ranks are decided
        job.progress(Progress("decompose", of, of, "linears"))
    tables = decompose_tables(model, job.outline.tables, kind, *found, job.batches)
    return CalibrationResult(store, terms, tables, walk, time.perf_counter() - started)


def walk_whole(job: FactorizationJob) -> Walk:
    """Walk up through the teacher with all its layers: what students that do without some are fitted and taught to.

    Args:
        job: whose source and anatomy have all layers.

    Raises:
        DataError, NumericsError, NotLayerByLayer: as of `Walk`.
    """
    needed = (len(job.anatomy.layers) + 2) * state_bytes(job.batches, job.source.model)
    store = choose_store(job.settings.store, needed, partial(job.store_on_disk, "-whole"))
    with frozen(job.source.model):
        walk = Walk(job.source, job.anatomy, job.batches, store)
        for _ in _up(job, walk):
            pass
    return walk


def warn_if_little_text(job: FactorizationJob) -> None:
    """Warn where there is less text than a solver that looks at inputs needs; once, before the work."""
    if job.kind.inputs:
        features = {name: linear_shape(job.source.model.get_submodule(name))[1] for name in job.anatomy.linears}
        warn_of_little_text(tokens_read(job), features)


def tokens_read(job: FactorizationJob) -> int:
    """Real tokens of the text that the solver reads; 0 for one that needs none, though there may be text."""
    return sum(map(_real_tokens, job.batches)) if job.kind.needs_text else 0


def _real_tokens(batch: Mapping[str, Tensor]) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def _wants_spectra(job: FactorizationJob) -> bool:
    compares = job.settings.share_input == "auto" and bool(job.groups)
    made_here = not job.kind.in_forward_order or bool(job.anatomy.stacks)
    return RANK_RULES[job.settings.rank_rule].needs_spectra or made_here or compares


def _max_ranks(job: FactorizationJob) -> Mapping[str, int] | None:
    if job.kind.in_forward_order:
        return None
    return find_max_ranks(job.problem({}, {}, None), job.groups)


def _bytes_kept(job: FactorizationJob) -> int:
    """What the store of a walk will hold at most: hidden states, and moments of output gradients."""
    if not job.kind.needs_text and not job.targets:
        return 0
    many = job.kind.gradients or job.targets
    layers = len(job.anatomy.layers) if many else 1
    grams = sum(size.out_features**2 * 2 for size in job.linear_sizes)
    return (layers + 2) * state_bytes(job.batches, job.source.model) + (grams if job.kind.gradients else 0)


def _backward_tokens(job: FactorizationJob) -> int | None:
    """How many tokens gradients are taken of; None for all."""
    predictions = job.anatomy.predictions
    if predictions is None or predictions.each != "token":
        return None  # a text has one direction a probe, whatever its length: none is to be missed
    return ROWS_PER_FEATURE * max(size.out_features for size in job.linear_sizes)


def _without_text(job: FactorizationJob, terms: Terms, on_matrix: Callable[[], None]) -> OfTables:
    for layer in job.anatomy.layers:
        cut = entries.decomposed(layer.index)
        if layer.call == 0 and not terms.store.is_marked(cut):
            with job.source.layer(layer):
                terms.keep(LayerMoments(layer.linears, stacks=job.anatomy.stacks_of(layer)), on_matrix)
            terms.store.mark(cut)
    return {}, {}


def _up(job: FactorizationJob, walk: Walk, keep: bool = True, watch: bool = False) -> Iterator[LayerMoments]:
    """`Walk.up`, which ends where the whole model does."""
    yield from walk.up(job.progress, keep, watch)
    if isinstance(job.source, ModelSource) and not walk.store.is_marked(entries.MODEL_CHECKED):
        walk.check_whole_model()
        walk.store.mark(entries.MODEL_CHECKED)


def _walked(job: FactorizationJob, walk: Walk, terms: Terms, on_matrix: Callable[[], None]) -> OfTables:
    kind = job.kind
    reads = kind.inputs and terms.request.spectra
    for moments in _up(job, walk, keep=kind.gradients or job.targets, watch=reads and not kind.gradients):
        terms.keep(moments, on_matrix)
    head = _head(job.outline.tables)
    inputs = {head: walk.head_inputs(head)} if kind.inputs and head is not None else {}
    if not kind.gradients:
        return inputs, {}
    for moments in walk.down(job.progress, inputs=reads):
        terms.keep(moments, on_matrix)
    embeddings = _embeddings(job)
    return inputs, walk.embedding_gradients(embeddings) if embeddings else {}


def _whole(job: FactorizationJob, terms: Terms, on_matrix: Callable[[], None]) -> OfTables:
    model, kind, head, embeddings = job.source.model, job.kind, _head(job.outline.tables), _embeddings(job)
    inputs, gradients = {}, {}
    experts: dict[str, ExpertMoments] = {}
    if kind.inputs:
        inputs = collect_input_moments(model, job.anatomy, track(job.batches, "calibrate", job.progress), head, experts)
    if kind.gradients:
        gradients = collect_gradient_moments(
            model, job.anatomy, track(job.batches, "gradients", job.progress), embeddings=embeddings
        )
    terms.keep(LayerMoments(job.anatomy.linears, inputs, gradients, experts, job.anatomy.stacks), on_matrix)
    return inputs, gradients


def _embeddings(job: FactorizationJob) -> dict[str, int]:
    """Embeddings that get factors -> features of their outputs."""
    model = job.source.model
    return {table.module: table_sizes(model, table)[0].in_features for table in job.outline.tables if table.embeds}


def _head(tables: Sequence[Table]) -> str | None:
    return next((table.head for table in tables if table.head is not None), None)
