"""Before the flow: how much memory each phase of a factorization holds, and how much its store.

It is that of a walk through the layers: the hidden states that enter each layer stand in a store; of moments and
decompositions there are those of one layer at a time. Models whose layers cannot be run one by one have those of all
layers at once. Bytes are counted beside those of Python and its libraries.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from makd.forecasting.learning import Lessons
from makd.forecasting.operations import TextShape
from makd.forecasting.shapes import ModelShape
from makd.ranks.allocation import LinearSize
from makd.solvers import Solver

AUTOGRAD_COPIES = 2.0
"""Numbers that autograd keeps of a layer, for each that its linears read or write. Measured: MiniLM-L6, all layers at
once, 39,568 tokens in batches of 2,048: 0.97 GB with weights and moments; this counts 0.95."""
MATRIX_COPIES = 3.0
"""Copies of a matrix while it is decomposed: itself, weighted, and a side of its terms."""
SQUARE_COPIES = 3.0
"""Matrices of its smaller side: its square, the eigenvectors, and room to compute them in."""
SOLVE_COPIES = 4
"""Matrices of a linear's size while it is regressed: the teacher's, cross moments, and both halves of the solution."""
TOO_LARGE = 1.5
"""How many times too large a forecast of what is not plain arithmetic may be (`python benchmarks/forecast.py`)."""
HEAD_TOKENS = 1024
"""Tokens whose logits are in memory at a time."""
LOGITS_COPIES = 4.0
"""Of those logits: what is drawn from them, and their gradient."""
_DOUBLE, _SINGLE = 8, 4


@dataclass(frozen=True)
class Memory:
    """Bytes that are held at the same time, in one phase of the work."""

    when: str
    weights: int = 0
    """Of teacher and student."""
    states: int = 0
    """Hidden states and their gradients, and what is kept of each layer until the end."""
    moments: int = 0
    decompositions: int = 0
    activations: int = 0
    """Of one batch in one layer, or of its logits."""
    unsure: int = 0
    """Bytes of the weights that may stand elsewhere: they are told, and nothing is refused for them."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.states + self.moments + self.decompositions + self.activations

    @property
    def least(self) -> int:
        """What it takes in any case: weights and states are plain arithmetic, the rest may be forecast too large."""
        known = self.weights + self.states
        return known - self.unsure + round((self.total - known) / TOO_LARGE)


@dataclass(frozen=True)
class Holdings:
    """What memory is counted from."""

    shape: ModelShape
    kind: Solver
    """The solver."""
    text: TextShape
    kept: float
    """The student's share of the teacher's parameters."""
    shares: bool
    """Whether linears that read the same input are also decomposed as one."""
    from_files: bool
    """Whether teacher and student stay on disk, but for a layer."""
    one_by_one: bool
    """Whether layers are run and decomposed one after the other."""
    beside: int
    """Matrices that are decomposed at a time."""
    drops: bool = False
    """Whether layers go."""
    lessons: Lessons | None = None
    """What layers are taught."""
    kept_linears: float = 1.0
    """The student's share of the parameters of the linears."""

    @property
    def targets(self) -> bool:
        """Whether layers of the student are fitted or taught to what the teacher's give."""
        return self.kind.in_forward_order or self.lessons is not None

    @property
    def walks(self) -> int:
        """Through the teacher: a second one, with all its layers, where some go and those that stay have targets."""
        return 2 if self.drops and self.targets else 1

    @property
    def store_bytes(self) -> int:
        """Of hidden states, and of what is kept of each layer until the end."""
        if not self.text.batches or not self.one_by_one:
            return 0
        if not (self.kind.gradients or self.targets):
            return 2 * self._states  # those that a layer reads, and those that it writes
        kept = 0
        if self.kind.gradients and self.kind.in_forward_order:
            sizes = [size for layer in self.shape.own_layers for size in layer.linears]
            kept = _SINGLE * sum(size.out_features * (size.out_features + 1) // 2 for size in sizes)
        return self.walks * len(self.shape.layers) * self._states + kept

    def phases(self, stored: int) -> tuple[Memory, ...]:
        """Memory of each phase, with `stored` bytes of the store in memory, in the order of the work."""
        phases: list[Memory] = []
        if self.kind.needs_text:
            phases += self._calibration(stored)
        else:
            weights = 0 if self.from_files else self._teacher + self._student
            phases.append(Memory("decompositions", weights, decompositions=self._decomposing()))
        if self.kind.in_forward_order:
            phases.append(self._regression(stored))
        elif self.kind.needs_text and not self.from_files:
            phases.append(Memory("factors", self._teacher + self._student, stored))
        if self.lessons is not None:
            phases.append(self._lessons(self.lessons, stored))
        return tuple(phases)

    @property
    def _states(self) -> int:
        """Of the hidden states that enter one layer."""
        return self.text.tokens * self.shape.hidden * self.shape.itemsize

    @property
    def _teacher(self) -> int:
        if not self.from_files:
            return self.shape.weight_bytes
        return self.shape.layer_bytes + self.text.largest * self.shape.row_bytes

    @property
    def _student(self) -> int:
        return round(self.kept * (self.shape.layer_bytes if self.from_files else self.shape.weight_bytes))

    def _layers(self, values: Iterable[int]) -> int:
        """Of all layers, or of that which has most, where they are done one by one."""
        return _most(values) if self.one_by_one else sum(values)

    def _calibration(self, stored: int) -> Iterator[Memory]:
        """Up, and down again if the solver asks for gradients."""
        shape, teacher, own = self.shape, self._teacher, self.shape.own_layers
        moments = 0
        if self.kind.inputs:
            moments += self._layers(_square_bytes(group[0].in_features for group in layer.inputs) for layer in own)
        passing = self.text.largest * shape.itemsize * _most(layer.activations for layer in own)
        if not self.kind.gradients:
            yield Memory("upwards", teacher, stored, moments, activations=passing)
            yield Memory("decompositions", teacher, stored, moments, self._decomposing())
            return
        moments += self._layers(_square_bytes(size.out_features for size in layer.linears) for layer in own)
        boundary = self._states * shape.probes if self.one_by_one else 0
        tokens = min(HEAD_TOKENS, self.text.largest) if self.one_by_one else self.text.largest
        logits = round(LOGITS_COPIES * _SINGLE * tokens * shape.vocabulary)
        held = round(
            AUTOGRAD_COPIES
            * self.text.largest
            * shape.itemsize
            * self._layers(layer.activations for layer in (own if self.one_by_one else shape.layers))
        )
        if self.one_by_one:
            head = shape.head_bytes if self.from_files else 0
            yield Memory("upwards", teacher, stored, activations=passing)
            yield Memory("head", teacher + head, stored + boundary, activations=logits)
            logits = 0
        yield Memory("downwards", teacher, stored + boundary, moments, activations=held + logits)
        yield Memory("decompositions", teacher, stored + boundary, moments, self._decomposing())

    def _regression(self, stored: int) -> Memory:
        own = self.shape.own_layers
        groups = [group for layer in own for group in layer.inputs]
        sizes = [size for group in groups for size in group]
        solving = [_DOUBLE * (size.in_features**2 + SOLVE_COPIES * size.dense) for size in sizes]
        solving += [self._decomposition((size.out_features,), size) for size in sizes]
        return Memory(
            "regression",
            self._teacher + self._student,
            stored + self._states,
            _most(map(_cross_bytes, groups)),
            _most(solving),
            self.text.largest * self.shape.itemsize * _most(layer.activations for layer in own),
        )

    def _lessons(self, lessons: Lessons, stored: int) -> Memory:
        """While a layer learns, the largest of them."""
        learning = lessons.learning_bytes(
            self.kept_linears * self.shape.layer_bytes / self.shape.itemsize, self.shape.itemsize
        )
        return Memory(
            "lessons",
            self._teacher + self._student + learning,
            stored + self._states,
            activations=_most(lessons.activation_bytes(layer, self.text.largest) for layer in self.shape.own_layers),
        )

    def _decomposing(self) -> int:
        """Of the largest decompositions that run side by side, the moments not counted; and what waits for ranks."""
        largest, waiting = 0, 0
        for layer in self.shape.own_layers:
            items: list[tuple[tuple[int, ...], LinearSize]] = [((size.out_features,), size) for size in layer.linears]
            if self.shares:
                groups = (group for group in layer.inputs if len(group) > 1)
                items += [(tuple(size.out_features for size in group), group[0]) for group in groups]
            found = sorted((self._decomposition(outs, size) for outs, size in items), reverse=True)
            largest = max(largest, sum(found[: self.beside]))
            waiting += sum(
                _DOUBLE * (sum(outs) + size.in_features) * min(sum(outs), size.in_features) for outs, size in items
            )
        return largest + (0 if self.one_by_one else waiting)

    def _decomposition(self, outs: Sequence[int], first: LinearSize) -> int:
        rows, features = sum(outs), first.in_features
        numbers = MATRIX_COPIES * rows * features + SQUARE_COPIES * min(rows, features) ** 2
        if self.kind.inputs:
            numbers += features**2
        if self.kind.inputs and self.kind.gradients:
            numbers += 2 * sum(out**2 for out in outs)
        return round(_DOUBLE * numbers)


def _most(values: Iterable[int]) -> int:
    return max(values, default=0)


def _square_bytes(sides: Iterable[int]) -> int:
    """Of second moments, and of products on their way to the largest of them."""
    known = list(sides)
    return _DOUBLE * sum(side**2 for side in known) + _SINGLE * max(known, default=0) ** 2


def _cross_bytes(group: Sequence[LinearSize]) -> int:
    """Of moments of inputs and targets, to fit and held out, of linears that read the same input."""
    return 2 * _DOUBLE * sum(size.in_features**2 + size.dense for size in group)
