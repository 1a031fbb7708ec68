"""A model as a torch.export program: one file that torch alone loads and runs."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.errors import ExportError
from makd.export.agreement import Agreement, check, compare, named_tensors
from makd.export.examples import Inputs, examples, input_names
from makd.export.tracing import exporting


class _Plain(nn.Module):
    """A forward whose outputs are a plain dictionary of tensors: torch knows those without transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The model's tensors by name."""
        extra = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        return named_tensors(self.model(**inputs, return_dict=True, **extra))


def save_program(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tolerance: float = 1e-4,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Agreement:
    """Write `model.pt2` into `folder`: `torch.export.load(path).module()(input_ids=..., attention_mask=...)`.

    Takes any number of rows and tokens. A decoder reads whole texts, without keys and values of earlier ones.

    Args:
        model: on the CPU.
        folder: that is there.
        tolerance: how far an output may be from the model's; only checked in float32.
        tokenizer: says which inputs the model is given.

    Returns:
        How far the program's outputs are from the model's, over inputs of several shapes.

    Raises:
        ExportError: it cannot be traced, or does not compute what the model computes.
    """
    was_training = model.training
    model.eval()
    path = Path(folder) / "model.pt2"
    plain = _Plain(model)
    try:
        names = input_names(model, tokenizer)
        if model.config.is_encoder_decoder:
            names = (*names, "decoder_input_ids")
        with exporting("A torch program"):
            torch.export.save(_trace(plain, _inputs_of(model, names)), str(path))
            loaded = torch.export.load(str(path)).module()
        with torch.no_grad(), exporting("Running the torch program"):
            agreement = compare(
                (loaded(**inputs), plain(**inputs), inputs["attention_mask"]) for inputs in _all_inputs(model, names)
            )
    finally:
        model.train(was_training)
    if model.dtype == torch.float32:
        check(agreement, tolerance, "torch program")
    return agreement


def _all_inputs(model: PreTrainedModel, names: tuple[str, ...]) -> list[Inputs]:
    given = tuple(name for name in names if name != "decoder_input_ids")
    found = list(examples(model, given))
    if "decoder_input_ids" in names:
        found = [inputs | {"decoder_input_ids": inputs["input_ids"].flip(1)} for inputs in found]
    return found


def _inputs_of(model: PreTrainedModel, names: tuple[str, ...]) -> Inputs:
    found = _all_inputs(model, names)
    if not found:
        raise ExportError(f"{type(model).__name__} has positions for fewer tokens than a trace needs.")
    return found[0]


def _trace(plain: _Plain, inputs: Inputs) -> torch.export.ExportedProgram:
    """Trace with transformers' own patches for what torch.export stumbles over, rows and tokens left open."""
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    rows, tokens = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    shapes = {name: {0: rows, 1: tokens} for name in inputs}
    exporter = DynamoExporter()
    config = DynamoConfig(dynamic_shapes=shapes)
    program, _ = exporter.export_program(plain, copy.deepcopy(inputs), config)  # type: ignore[arg-type]
    return program
