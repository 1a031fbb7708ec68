"""Station 3: from the moments of a layer to what is kept of its linears: spectra, factors, weights of errors.

Everything that may be factored (a linear, or a group of linears that read the same input, as one) is decomposed while
the moments of its layer are there. Afterwards ranks are chosen by what is in the store.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from makd.anatomy import ExpertStack
from makd.anatomy.routed import dense_expert
from makd.calibration import entries
from makd.calibration.moments import InputMoments
from makd.calibration.store import Store
from makd.calibration.walk import LayerMoments
from makd.ranks.allocation import LinearSize
from makd.ranks.sharing import Group, SharedStack
from makd.solvers import Solver, spectra_two_sided
from makd.solvers.factors import Factors, Spectrum
from makd.solvers.kind import decompose
from makd.solvers.parallel import map_on_cores
from makd.solvers.stacks import Side, StackDecomposition, StackFactors, StackProblem, decompose_stack
from makd.solvers.svd import stack
from makd.student.linear import dense_weight


@dataclass(frozen=True)
class DecompositionRequest:
    """What is to be kept of linears, groups and stacks of experts."""

    kind: Solver
    groups: tuple[Group, ...]
    """That may share one factor."""
    max_ranks: Mapping[str, int] | None
    """Linear, or group by its name -> the largest rank that it may get, 0 for those that stay dense; None where ranks
    follow from whole spectra."""
    spectra: bool
    """Whether decompositions are wanted at all: solvers that fit the student to its own inputs make their factors
    later, and need spectra only to choose ranks by."""
    custom_solver: str = ""
    """Name of the solver, if it is a user's."""


class Terms:
    """What is kept of linears and groups, in a store."""

    def __init__(self, store: Store, model: nn.Module, request: DecompositionRequest, device: torch.device) -> None:
        """Nothing is looked at yet.

        Args:
            store: where it is kept.
            model: the teacher; weights of linears have to be there while they are decomposed.
            request: what is.
            device: where decompositions are made.
        """
        self.store, self.model, self.request, self.device = store, model, request, device

    def keep(self, moments: LayerMoments, on_matrix: Callable[[], None] = lambda: None) -> None:
        """Decompose the linears that `moments` are of, and their groups; keep what errors are weighed by later.

        Raises:
            NumericsError: weights or moments hold NaN or infinity.
        """
        if self.request.spectra:
            keep = self._keep_spectra if self.request.kind.in_forward_order else self._keep_decompositions
            keep(moments, on_matrix)
            self._keep_stacks(moments, on_matrix)
        if self.request.kind.in_forward_order:
            for name in moments.linears:
                if name not in moments.gradients:
                    continue
                found = moments.gradients[name]
                self.store.write(entries.output_gram(name), {"lower": _packed(found.gram)})

    def _keep_spectra(self, moments: LayerMoments, on_matrix: Callable[[], None]) -> None:
        """Of linears whose factors are found otherwise: all that read the same tensor together."""
        readers: dict[int, list[str]] = {}
        for name in moments.linears:
            readers.setdefault(id(moments.inputs[name]), []).append(name)

        def spectra(names: list[str]) -> dict[tuple[str, ...], Spectrum]:
            weights = {name: dense_weight(self.model.get_submodule(name)).to(self.device) for name in names}
            grams = _GramsByName({name: moments.gradients[name] for name in names if name in moments.gradients})
            groups = [group.linears for group in self.request.groups if set(group.linears) <= set(names)]
            return spectra_two_sided(weights, moments.inputs[names[0]].gram, grams, groups)

        for found in map_on_cores(spectra, list(readers.values()), self.device):
            for linears, spectrum in found.items():
                self._write(" + ".join(linears), spectrum)
                on_matrix()

    def _keep_decompositions(self, moments: LayerMoments, on_matrix: Callable[[], None]) -> None:
        """Of linears whose factors are cut from their decompositions: as many terms as may be needed."""
        inside = set(moments.linears)
        items: dict[str, tuple[str, ...]] = {name: (name,) for name in moments.linears}
        for group in self.request.groups:
            if set(group.linears) <= inside and _one_input(group.linears, moments):
                items[group.name] = group.linears
        wanted = [name for name in items if self._max_rank(name) != 0]
        made = map_on_cores(
            lambda name: self._decompose(items[name], moments, self._max_rank(name)), wanted, self.device
        )
        for name, (spectrum, factors) in zip(wanted, made, strict=True):
            if factors is not None:
                self.store.write(entries.factors(name), {"expand": factors.expand, "reduce": factors.reduce})
            self._write(name, spectrum)
            on_matrix()

    def _keep_stacks(self, moments: LayerMoments, on_matrix: Callable[[], None]) -> None:
        """Of experts, alone and with one factor for all of them, whatever the solver does with linears."""
        ways: list[tuple[str, ExpertStack, Side]] = [(stack.name, stack, "") for stack in moments.stacks]
        by_name = {stack.name: stack for stack in moments.stacks}
        ways += [
            (group.name, by_name[group.stack], group.side)
            for group in self.request.groups
            if isinstance(group, SharedStack) and group.stack in by_name
        ]
        wanted = [way for way in ways if self._max_rank(way[0]) != 0]
        problems = {stack.name: self._problem(stack, moments) for _, stack, _ in wanted}

        def decompose(way: tuple[str, ExpertStack, Side]) -> StackDecomposition:
            name, stack, side = way
            size = LinearSize(name, stack.out_features, stack.in_features, False, stack.experts, side)
            max_rank = self._max_rank(name)
            return decompose_stack(problems[stack.name], side, size.break_even if max_rank is None else max_rank)

        for (name, _, _), found in zip(wanted, map_on_cores(decompose, wanted, self.device), strict=True):
            mix = {} if found.mix is None else {"mix": found.mix}
            self.store.write(entries.factors(name), {"expand": found.expand, "reduce": found.reduce, **mix})
            self._write(name, found.spectrum)
            on_matrix()

    def _problem(self, stack: ExpertStack, moments: LayerMoments) -> StackProblem:
        kind, module = self.request.kind, self.model.get_submodule(stack.module)
        weights = [dense_expert(module, stack.leaf, expert).detach().to(self.device) for expert in range(stack.experts)]
        gradients = moments.gradients[stack.name].gram if kind.gradients else None
        if not kind.inputs:
            return StackProblem(weights, torch.ones(stack.experts), gradient_gram=gradients, by_rows=True)
        found = moments.experts[stack.name]
        of_layer = found.layer_gram
        grams = [found.pulled(expert, of_layer) for expert in range(stack.experts)]
        return StackProblem(weights, found.shares, grams, of_layer, gradients)

    def stack_factors(self, name: str, rank: int) -> StackFactors:
        """Factors of a stack, in the dtype of the teacher's and on the device."""
        tensors = self.store.read(entries.factors(name), self.device)
        found = StackDecomposition(tensors["expand"], tensors["reduce"], self.spectrum(name), tensors.get("mix"))
        owner, _, leaf = name.split(" + ")[0].rpartition(".")
        return found.factors(rank, self.model.get_submodule(owner).get_parameter(leaf).dtype)

    def _write(self, name: str, spectrum: Spectrum) -> None:
        notes = {} if spectrum.fallback is None else {"fallback": spectrum.fallback}
        self.store.write(entries.spectrum(name), spectrum.to_tensors(), notes)

    def groups(self) -> tuple[Group, ...]:
        """Those that may share one factor, as far as it was seen."""
        seen = (group for group in self.request.groups if not self.request.spectra or self._is_kept(group.name))
        return tuple(seen)

    def spectra(self, names: Iterable[str]) -> dict[str, Spectrum]:
        """Those of linears and groups."""
        return {name: self.spectrum(name) for name in names}

    def spectrum(self, name: str) -> Spectrum:
        """That of a linear or group."""
        entry = entries.spectrum(name)
        tensors = self.store.read(entry)
        errors = tensors.get("squared_errors")
        return Spectrum(tensors["singular_values"], self.store.notes(entry).get("fallback"), errors)

    def factors(self, name: str, rank: int) -> Factors:
        """Factors of a linear or group, on the device."""
        tensors, spectrum = self.store.read(entries.factors(name), self.device), self.spectrum(name)
        return Factors(
            expand=tensors["expand"][:, :rank],
            reduce=tensors["reduce"][:rank],
            error=spectrum.relative_error(rank),
            fallback=spectrum.fallback,
            squared_error=spectrum.squared_error(rank),
        )

    def gram(self, linear: str) -> Tensor:
        """Second moments of a linear's output gradients, float64 (out, out)."""
        return _unpacked(self.store.read(entries.output_gram(linear), self.device)["lower"])

    def is_decomposed(self, name: str) -> bool:
        """Whether there is a spectrum of this linear or group."""
        return entries.spectrum(name) in self.store

    def _is_kept(self, name: str) -> bool:
        return self._max_rank(name) == 0 or self.is_decomposed(name)

    def _max_rank(self, name: str) -> int | None:
        return None if self.request.max_ranks is None else self.request.max_ranks.get(name, 0)

    def _decompose(
        self, linears: tuple[str, ...], moments: LayerMoments, rank: int | None
    ) -> tuple[Spectrum, Factors | None]:
        """Of linears as one: the spectrum, and factors of the largest rank."""
        kind = self.request.kind
        weight = stack([dense_weight(self.model.get_submodule(linear)) for linear in linears]).to(self.device)
        grams = [moments.gradients[linear].gram for linear in linears] if kind.gradients else []
        gram = moments.inputs[linears[0]].gram if kind.inputs else None
        made = decompose(self.request.custom_solver, kind, weight, gram, grams, rank)
        if rank is None:
            out_features, in_features = weight.shape
            rank = LinearSize(" + ".join(linears), out_features, in_features, has_bias=False).break_even
        highest = min(len(made.singular_values), rank)
        return made.spectrum, made.factors(highest) if highest else None


def _one_input(linears: tuple[str, ...], moments: LayerMoments) -> bool:
    """Whether these read the same tensor in calibration; taken for granted where nobody looked."""
    return not moments.inputs or len({id(moments.inputs[name]) for name in linears}) == 1


class _GramsByName(Mapping[str, Tensor]):
    """Linear -> second moments, each made when it is asked for: two may be more than there is room for."""

    def __init__(self, moments: Mapping[str, InputMoments]) -> None:
        self.moments = moments

    def __getitem__(self, name: str) -> Tensor:
        return self.moments[name].gram

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)


def _packed(gram: Tensor) -> Tensor:
    """The lower triangle in float32, row by row: a quarter of the bytes, known to seven digits of its entries."""
    lower = gram.new_empty(len(gram) * (len(gram) + 1) // 2, dtype=torch.float32)
    for row, start in enumerate(_starts(len(gram))):  # indices of all entries would take more room than these
        lower[start : start + row + 1] = gram[row, : row + 1]
    return lower


def _unpacked(lower: Tensor) -> Tensor:
    size = int(((8 * lower.numel() + 1) ** 0.5 - 1) / 2)
    gram = lower.new_empty(size, size, dtype=torch.float64)
    for row, start in enumerate(_starts(size)):
        gram[row, : row + 1] = lower[start : start + row + 1]
        gram[:row, row] = gram[row, :row]
    return gram


def _starts(size: int) -> Iterator[int]:
    """Where each row of a lower triangle begins."""
    return accumulate(range(size))
