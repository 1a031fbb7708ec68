"""Before the flow: what a factorization computes, counted. No model is run, and none has to have weights.

    shapes of the layers, rows of text, solver -> products, eigenvectors and elements, which a machine's speed turns
    into seconds (`machine`)

Products are counted as multiplications and additions, two for each pair of numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from makd.ranks.allocation import LinearSize
from makd.solvers import Solver
from makd.solvers.regression import RIDGES
from makd.solvers.svd import DEGREE, OVERSAMPLING, WORTHWHILE


@dataclass(frozen=True)
class TextShape:
    """How much text there is: (rows, tokens of a row) of each batch, padding counted."""

    batches: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Of all batches."""
        return sum(rows * tokens for rows, tokens in self.batches)

    @property
    def pairs(self) -> int:
        """Pairs of tokens that attention compares, of all batches."""
        return sum(rows * tokens**2 for rows, tokens in self.batches)

    @property
    def largest(self) -> int:
        """Tokens of the largest batch."""
        return max((rows * tokens for rows, tokens in self.batches), default=0)


@dataclass(frozen=True)
class LayerShape:
    """What of a layer costs time and memory."""

    inputs: tuple[tuple[LinearSize, ...], ...]
    """Its linears, those that read the same input together."""
    attention: int = 0
    """Features of its queries; 0 where it has none."""
    experts: int = 0
    """Parameters of routed experts that a token goes through."""
    keys: int = 0
    """Numbers of its keys and values that are kept of each token while text is written."""

    @property
    def linears(self) -> tuple[LinearSize, ...]:
        """All linears, in forward order."""
        return tuple(size for group in self.inputs for size in group)

    @property
    def weights(self) -> int:
        """Weights that a token meets."""
        return sum(size.dense for size in self.linears) + self.experts

    @property
    def activations(self) -> int:
        """Numbers that the linears read and write for one token."""
        return sum(group[0].in_features for group in self.inputs) + sum(size.out_features for size in self.linears)


@dataclass(frozen=True)
class Operations:
    """Counts of work."""

    products: float = 0.0
    """In the model's own dtype: forwards and backwards."""
    single: float = 0.0
    """In float32: moments."""
    double: float = 0.0
    """In float64: decompositions and solves."""
    eigen: Mapping[int, float] = field(default_factory=dict)
    """Rows of a symmetric matrix in float64 -> of how many such matrices eigenvectors are computed."""
    elements: float = 0.0
    """Numbers that pass through a layer between its products."""
    logits: float = 0.0
    """Logits from which predictions are drawn and differentiated."""

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(
            self.products + other.products,
            self.single + other.single,
            self.double + other.double,
            _added(self.eigen, other.eigen),
            self.elements + other.elements,
            self.logits + other.logits,
        )

    def times(self, number: int | float) -> "Operations":
        """So often."""
        return Operations(
            self.products * number,
            self.single * number,
            self.double * number,
            {size: count * number for size, count in self.eigen.items()},
            self.elements * number,
            self.logits * number,
        )


def _added(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    return {size: one.get(size, 0.0) + other.get(size, 0.0) for size in {**one, **other}}


def total(parts: Iterable[Operations]) -> Operations:
    """All of them together."""
    return sum(parts, start=Operations())


def forward(layer: LayerShape, text: TextShape) -> Operations:
    """A layer's forward of all batches."""
    products = 2.0 * text.tokens * layer.weights + 4 * layer.attention * text.pairs
    return Operations(products=products, elements=1.0 * text.tokens * layer.activations)


def backward(layer: LayerShape, text: TextShape) -> Operations:
    """From the gradient of a layer's outputs to that of its inputs; its weights are asked for none."""
    products = 2.0 * text.tokens * layer.weights + 8 * layer.attention * text.pairs
    return Operations(products=products, elements=1.0 * text.tokens * layer.activations)


def head(weights: int, vocabulary: int, text: TextShape, probes: int) -> Operations:
    """Predictions drawn from the logits of all tokens, and their gradients."""
    count = 1.0 * text.tokens * vocabulary * probes
    return Operations(products=2.0 * (1 + probes) * text.tokens * weights, logits=count)


def input_moments(layer: LayerShape, text: TextShape) -> Operations:
    """Second moments of each distinct input of a layer."""
    return Operations(single=sum(2.0 * text.tokens * group[0].in_features ** 2 for group in layer.inputs))


def gradient_moments(layer: LayerShape, text: TextShape) -> Operations:
    """Second moments of the output gradients of each linear of a layer, to which each token gives one row."""
    return Operations(single=sum(2.0 * text.tokens * size.out_features**2 for size in layer.linears))


def cross_moments(layer: LayerShape, text: TextShape) -> Operations:
    """Moments of what the student's linears read, alone and with what they are to give."""
    return Operations(
        single=sum(
            2.0 * text.tokens * group[0].in_features * (group[0].in_features + sum(size.out_features for size in group))
            for group in layer.inputs
        )
    )


def decomposition(kind: Solver, outs: Sequence[int], features: int, rank: int | None) -> Operations:
    """A matrix decomposed: its rows are those of linears with `outs` outputs, its columns their `features` inputs.

    Args:
        kind: the solver.
        outs: outputs of the linear; several, where linears are decomposed as one.
        features: that they read.
        rank: how many terms are asked for; None is all.
    """
    rows = sum(outs)
    small, large = min(rows, features), max(rows, features)
    terms = small if rank is None else min(rank, small)
    few = rank is not None and rank + OVERSAMPLING <= WORTHWHILE * small
    double = 1.5 * small**2 * large + 2 * terms * rows * features
    if rows > features:
        double += 2 * rows * features * terms
    if kind.inputs:
        double += _root(features) + 2 * rows * features**2
    if kind.inputs and kind.gradients:
        double += sum(_root(out) + out**2 * (2 * features + terms) for out in outs)
    if not few:
        return Operations(double=double, eigen={small: 1.0})
    double += 4 * (DEGREE + 2) * small**2 * terms + 8 * small * terms**2
    eigen = {terms + OVERSAMPLING: 2.0}
    return Operations(double=double, eigen=eigen) if kind.needs_text else Operations(single=double, eigen=eigen)


def _root(size: int) -> float:
    """Of `square_root`: Cholesky's factor twice, the first time to see whether the moments are positive definite."""
    return 2 / 3 * size**3


def regression(kind: Solver, outs: Sequence[int], features: int, rank: int) -> Operations:
    """Factors of one rank fitted to moments of inputs and targets, with the ridge that does best on held-out ones."""
    rows = sum(outs)
    solve = features**3 / 3 + 2 * features**2 * rows
    residual = 2 * rows * features**2
    if kind.gradients:
        residual += sum(2 * out**2 * features for out in outs)
    double = (len(RIDGES) + 1) * solve + len(RIDGES) * residual
    if not kind.gradients:  # the error of every rank
        double += 2 * min(rank, rows, features) * features * (rows + features)
    return Operations(double=double) + decomposition(kind, outs, features, rank)
