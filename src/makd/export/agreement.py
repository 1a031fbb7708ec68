"""How far a file's outputs are from the model's, over tokens that are not padding."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.errors import ExportError
from makd.export.examples import examples


@dataclass(frozen=True)
class Agreement:
    """What was found on all inputs that were tried."""

    largest_difference: float
    """Between two numbers of the outputs."""
    largest_output: float
    """Of the model's."""
    relative_error: float
    """The norm of all differences over that of all outputs."""
    rows: int
    """That were compared."""


def compare(pairs: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor], Tensor]]) -> Agreement:
    """How far outputs are from the model's.

    Args:
        pairs: the file's outputs and the model's, by name, with the mask (rows, tokens) of what was read. An output
            whose second axis is that of tokens is compared where the mask is 1.

    Raises:
        ExportError: an output is missing, has another shape, or is not finite.
    """
    largest, highest, squares, total, rows = 0.0, 0.0, 0.0, 0.0, 0
    for found, expected, mask in pairs:
        rows += len(mask)
        for name, theirs in expected.items():
            if name not in found:
                raise ExportError(f"The file has no output {name!r}, only {', '.join(found)}.")
            ours = found[name]
            if ours.shape != theirs.shape:
                raise ExportError(
                    f"The file's {name} is of shape {tuple(ours.shape)} for {tuple(mask.shape)} tokens; the model's is "
                    f"of {tuple(theirs.shape)}. It was traced for one shape alone."
                )
            if theirs.dim() > 1 and theirs.shape[:2] == mask.shape:
                ours, theirs = ours[mask.bool()], theirs[mask.bool()]
            ours, theirs = ours.double(), theirs.double()
            if not bool(ours.isfinite().all()):
                raise ExportError(f"The file's {name} holds NaN or infinity for {tuple(mask.shape)} tokens.")
            difference = ours - theirs
            largest = max(largest, float(difference.abs().max()))
            highest = max(highest, float(theirs.abs().max()))
            squares += float(difference.square().sum())
            total += float(theirs.square().sum())
    return Agreement(largest, highest, (squares / total) ** 0.5 if total else 0.0, rows)


@torch.no_grad()
def compare_forwards(
    run: Callable[..., Mapping[str, object]], model: PreTrainedModel, names: Sequence[str]
) -> Agreement:
    """How far the outputs of `run` are from those of `model`, in eval mode, given the same inputs.

    Args:
        run: what was written, loaded again; takes what `model` takes.
        model: that it was made of.
        names: of the inputs.

    Raises:
        ExportError: as `compare`.
    """
    return compare(
        (named_tensors(run(**inputs)), named_tensors(model(**inputs, return_dict=True)), inputs["attention_mask"])
        for inputs in examples(model, names, seed=1)
    )


def named_tensors(outputs: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors among a model's outputs; without states and caches inside it."""
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def check(agreement: Agreement, tolerance: float, what: str) -> None:
    """Hold what was found to `tolerance`, in units of the largest output where that is above 1.

    Raises:
        ExportError: an output is further from the model's.
    """
    if agreement.largest_difference > tolerance * max(1.0, agreement.largest_output):
        raise ExportError(
            f"The {what} does not compute what the model computes: an output differs by "
            f"{agreement.largest_difference:.2g}, where the largest is {agreement.largest_output:.2g} (tolerance "
            f"{tolerance:.2g}; all of them by {agreement.relative_error:.2g} of their norm). It is not to be used."
        )
