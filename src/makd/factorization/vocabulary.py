"""Station 3: the matrices with a row for each token, embeddings and LM head, as factors.

Embeddings that no LM head shares are cut into bands of tokens by frequency, each a matrix of its own with its own rank.

What the solvers do for a linear, for matrices whose one side is the vocabulary: moments of that side would be V x V,
and are taken as diagonal. A one-hot input has a diagonal second moment, the tokens' frequencies; and the Fisher matrix
of a softmax is nearly one, the mean probabilities, which in text that a model predicts well are the frequencies too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy
from makd.anatomy.tokens import encoder_tokens
from makd.calibration.counted import CountedBatches
from makd.calibration.moments import InputMoments
from makd.ranks.allocation import LinearSize
from makd.solvers import Solver
from makd.solvers.eigen import eigh
from makd.solvers.factors import Decomposition, Factors
from makd.solvers.two_sided import OUTPUT_RIDGE
from makd.solvers.whitened import square_root
from makd.student.adaptive_embedding import AdaptiveEmbedding
from makd.student.embedding import LowRankEmbedding, rename_ties_
from makd.student.linear import LowRankLinear

CUTOFFS = (1 / 64, 1 / 16, 1 / 4)
"""Where embeddings are cut into bands: shares of the vocabulary, from the most frequent token on. Four bands that grow
four times from one to the next; seven that double are no better (docs/explanation/method.md)."""
SMALLEST_BAND = 8
"""Rows of the first band, at least; smaller vocabularies are one matrix."""
UNSEEN = 0.5
"""Share of the weight that all tokens get alike; the rest goes by how often the text has them: the student will meet
others."""
UNSEEN_IN_BANDS = 0.8
"""The same where rare tokens may have a rank of their own: training mends what frequent ones lose, and no others.
A tenth of MiniLM-L6 after training, CoLA and SST-2, one seed, with 0.5, 0.8 and 0.95: 21.8, 25.7 and 22.7; 81.7, 82.2
and 82.8."""


@dataclass(frozen=True)
class Table:
    """A matrix (V, d) with a row for each token."""

    module: str
    """The embeddings, or an LM head of its own."""
    embeds: bool
    """Whether tokens are looked up in it."""
    head: str | None
    """The linear that makes logits with it, if any: itself, or one that is tied to the embeddings."""
    bands: tuple[int, ...] = ()
    """Rows of each band of tokens, from the most frequent on; empty where all of it is one matrix."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What has a rank of its own: the bands, by the places of their tokens in order of frequency, or all of it."""
        ends = list(accumulate(self.bands, initial=0))
        return tuple(f"{self.module}[{begin}:{end}]" for begin, end in pairwise(ends)) or (self.module,)


def find_tables(
    model: PreTrainedModel, anatomy: Anatomy, by_frequency: bool = False
) -> tuple[tuple[Table, ...], dict[str, str]]:
    """The matrices of the vocabulary that can be factored; and those that cannot, with the reason.

    Args:
        model: with all its parts.
        anatomy: of `model`.
        by_frequency: whether embeddings that no head shares are cut into bands.
    """
    if not anatomy.embeddings:
        return (), {"embeddings": "the model does not say where they are"}
    name = anatomy.embeddings[0]
    embedding, head = model.get_submodule(name), _head_name(model)
    if head is not None and anatomy.dense_vocabulary is not None:
        return (), {name: anatomy.dense_vocabulary}
    shared = _others_with(model, embedding, {name, head})
    reason = None
    if anatomy.is_encoder_decoder:
        reason = "encoder and decoder of this model share it with other modules"
    elif type(embedding) is not nn.Embedding:
        reason = f"{type(embedding).__name__} does more than look rows up"
    elif shared:
        reason = f"{shared[0]} shares its weight"
    tied = head is not None and model.get_submodule(head).get_parameter("weight") is embedding.get_parameter("weight")
    tables, left = [], {}
    if reason is None:
        bands = bands_of(len(embedding.get_parameter("weight"))) if by_frequency and not tied else ()
        tables.append(Table(name, True, head if tied else None, bands))
    else:
        left[name] = reason
    if head is not None and not tied:
        tables.append(Table(head, False, head))
    return tuple(tables), left


def bands_of(rows: int, cutoffs: Sequence[float] = CUTOFFS) -> tuple[int, ...]:
    """Rows of each band of a vocabulary of `rows` tokens, cut at these shares of it; none if that is too small."""
    ends = [0, *(int(share * rows) for share in cutoffs), rows]
    return tuple(end - begin for begin, end in pairwise(ends)) if ends[1] >= SMALLEST_BAND else ()


def _head_name(model: PreTrainedModel) -> str | None:
    """The linear that gives a logit for each token, if the model has one."""
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or head.out_features != tokens.get_parameter("weight").shape[0]:
        return None
    names: list[str] = [name for name, module in model.named_modules() if module is head]
    return names[0]


def _others_with(model: nn.Module, embedding: nn.Module, known: set[str | None]) -> list[str]:
    weight = embedding.get_parameter("weight")
    names = (name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight)
    return [name for name in names if name.rpartition(".")[0] not in known]


def table_sizes(model: PreTrainedModel, table: Table) -> tuple[LinearSize, ...]:
    """What allocation knows of its parts; a head's bias stays as it is, and is counted with the rest of the model."""
    rows, columns = model.get_submodule(table.module).get_parameter("weight").shape
    counts = table.bands or (rows,)
    return tuple(
        LinearSize(name, count, columns, has_bias=False) for name, count in zip(table.parts, counts, strict=True)
    )


def token_frequencies(
    batches: Iterable[Mapping[str, Tensor]], tokens: int, unseen: float = UNSEEN
) -> Float[Tensor, " tokens"]:
    """Share of each token id among the real tokens of `batches`, mixed with `unseen` of an even one; they sum to 1.

    Of `CountedBatches`, among the tokens of all the text that they were taken from.
    """
    counts = torch.zeros(tokens, dtype=torch.float64)
    if isinstance(batches, CountedBatches):
        counts[: len(batches.token_counts)] += batches.token_counts
    else:
        for batch in batches:
            counts += torch.bincount(batch["input_ids"][encoder_tokens(batch)].cpu(), minlength=tokens)
    if not bool(counts.any()):
        return torch.full_like(counts, 1 / tokens)
    return (1 - unseen) * counts / counts.sum() + unseen / tokens


def table_metric(
    table: Table,
    inputs: Mapping[str, InputMoments],
    gradients: Mapping[str, InputMoments],
    model: PreTrainedModel,
) -> Float[Tensor, "dim dim"]:
    """What an error e of a token's row costs, eᵀ M e, each time that the token is met.

    As an embedding, e goes into the model: M is the second moment of gradients there (without them, the identity). As a
    row of the head, e makes an error xᵀ e of the token's logit: M is the second moment of the head's inputs. Both are
    in units of the model's outputs if there are gradients, and add up; else each is first scaled to a mean eigenvalue
    of 1.
    """
    weight = model.get_submodule(table.module).get_parameter("weight")
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    parts = []
    if table.embeds and table.module in gradients:
        gram = gradients[table.module].gram
        parts.append(gram + OUTPUT_RIDGE * float(gram.diagonal().mean()) * identity)
    elif table.embeds:
        parts.append(identity)
    if table.head is not None and table.head in inputs:
        gram = inputs[table.head].gram
        parts.append(gram if gradients else gram / gram.diagonal().mean().clamp(min=1e-30))
    return torch.stack(parts).sum(0) if parts else identity


@dataclass(frozen=True)
class TableTerms:
    """What the factors of the vocabulary are cut from."""

    parts: Mapping[str, Decomposition]
    """Of each part of each table, by `Table.parts`."""
    orders: Mapping[str, Int[Tensor, " vocabulary"]]
    """Of each table in bands: its tokens, from the most frequent on."""


NO_TABLES = TableTerms({}, {})
"""Of models whose vocabulary stays as it is."""


def decompose_tables(
    model: PreTrainedModel,
    tables: Iterable[Table],
    kind: Solver,
    inputs: Mapping[str, InputMoments],
    gradients: Mapping[str, InputMoments],
    batches: Iterable[Mapping[str, Tensor]],
) -> TableTerms:
    """Decompositions of the tables, with as much of the statistics as the solver `kind` looks at."""
    parts: dict[str, Decomposition] = {}
    orders = {}
    for table in tables:
        weight = model.get_submodule(table.module).get_parameter("weight")
        unseen = UNSEEN_IN_BANDS if table.bands else UNSEEN
        frequencies = token_frequencies(batches if kind.needs_text else (), len(weight), unseen)
        metric = table_metric(table, inputs, gradients, model)
        if not table.bands:
            parts[table.module] = decompose_table(weight, frequencies, metric)
            continue
        orders[table.module] = order = frequencies.argsort(descending=True, stable=True)
        for name, tokens in zip(table.parts, order.split(table.bands), strict=True):
            parts[name] = decompose_table(weight[tokens.to(weight.device)], frequencies[tokens], metric)
    return TableTerms(parts, orders)


def decompose_table(
    table: Float[Tensor, "vocabulary dim"],
    frequencies: Float[Tensor, " vocabulary"],
    metric: Float[Tensor, "dim dim"],
) -> Decomposition:
    """Terms of a table T ordered by what they are worth: leaving out ΔT costs tr(F ΔT M ΔTᵀ), F = diag(frequencies).

    With M = L Lᵀ and T_w = F^½ T L = U S Vᵀ, the best T' of rank r satisfies F^½ T' L = U_r S_r V_rᵀ, so
    T' = (T L V_r)(V_rᵀ L⁻¹). V and S come from the eigenvectors of T_wᵀ T_w, (d, d): nothing of size V x V is made.

    Raises:
        NumericsError: `metric` holds NaN or infinity.
    """
    lower, fallback = square_root(metric, "its metric")
    wide = table.detach().to(torch.float64)
    weighted = wide @ lower
    energies, vectors = eigh(weighted.T @ (frequencies.to(wide.device)[:, None] * weighted))
    vectors = vectors.flip(1)[:, : min(table.shape)]
    singular_values = energies.flip(0).clamp(min=0).sqrt()[: min(table.shape)]
    right = torch.linalg.solve_triangular(lower.T, vectors, upper=True).T
    return Decomposition(weighted @ vectors, right, singular_values, table.dtype, fallback)


def table_factors(decomposition: Decomposition, rank: int) -> Factors:
    """The best factors of this rank: `expand` is (V, rank), `reduce` (rank, d).

    Numbers in a column of the one and the row of the other that it meets are made alike in size, so that one learning
    rate fits both.
    """
    left, right = decomposition.left[:, :rank], decomposition.right[:rank]
    sizes = left.square().mean(0).sqrt(), right.square().mean(1).sqrt()
    scale = (sizes[1] / sizes[0].clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return Factors(
        expand=(left * scale).to(decomposition.dtype),
        reduce=(right / scale[:, None]).to(decomposition.dtype),
        error=decomposition.relative_error(rank),
        fallback=decomposition.fallback,
        squared_error=decomposition.squared_error(rank),
    )


@torch.no_grad()
def replace_tables_(
    student: PreTrainedModel,
    tables: Iterable[Table],
    ranks: Mapping[str, int | None],
    terms: TableTerms,
) -> dict[str, Factors]:
    """Put factors in the place of embeddings and head; a tied head shares them. Those of rank None stay as they are.

    Returns:
        The factors of each part that has some, by `Table.parts`.
    """
    fitted: dict[str, Factors] = {}
    for table in tables:
        found = {
            name: table_factors(terms.parts[name], rank) for name in table.parts if (rank := ranks[name]) is not None
        }
        fitted |= found
        if not found:
            continue
        if table.bands:
            dense = student.get_submodule(table.module)
            assert isinstance(dense, nn.Embedding)
            bands = [found.get(name) for name in table.parts]
            student.set_submodule(table.module, _in_bands(dense, table, bands, terms.orders[table.module]).eval())
        else:
            _replace_whole_(student, table, found[table.module])
    rename_ties_(student)
    return fitted


def _in_bands(
    dense: nn.Embedding, table: Table, bands: Sequence[Factors | None], tokens: Int[Tensor, " vocabulary"]
) -> AdaptiveEmbedding:
    """Embeddings of which each band has these factors, or its rows of `dense` where it has none."""
    tokens = tokens.to(dense.weight.device)
    layer = AdaptiveEmbedding(
        dense.embedding_dim,
        table.bands,
        [None if factors is None else factors.expand.shape[1] for factors in bands],
        dense.padding_idx,
        tokens.argsort(),
        dense.weight.device,
        dense.weight.dtype,
    )
    for band, factors, inside in zip(layer.bands, bands, tokens.split(table.bands), strict=True):
        band.get_parameter("table.weight").copy_(dense.weight[inside] if factors is None else factors.expand)
        if factors is not None:
            band.get_parameter("directions.weight").copy_(factors.reduce)
    return layer


def _replace_whole_(student: PreTrainedModel, table: Table, factors: Factors) -> None:
    """Put factors of one rank in the place of a table and of the head that it is tied to."""
    if table.embeds:
        dense = student.get_submodule(table.module)
        assert isinstance(dense, nn.Embedding)
        layer = LowRankEmbedding(
            dense.num_embeddings,
            dense.embedding_dim,
            factors.expand.shape[1],
            dense.padding_idx,
            dense.weight.device,
            factors.expand.dtype,
        )
        layer.table.weight.copy_(factors.expand)
        layer.directions.weight.copy_(factors.reduce)
        student.set_submodule(table.module, layer.eval())
    if table.head is not None:
        linear = student.get_submodule(table.head)
        head = LowRankLinear.from_factors(factors, None)
        # other modules may hold the bias too, as BERT's predictions do
        head.expand.register_parameter("bias", linear.get_parameter("bias") if linear.bias is not None else None)
        if table.embeds:
            head.expand.weight, head.reduce.weight = layer.table.weight, layer.directions.weight
        student.set_submodule(table.head, head.eval())
