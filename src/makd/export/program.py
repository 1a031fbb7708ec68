"""A model as a torch.export program: one file that torch alone loads and runs."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.eval_mode import in_eval
from makd.export.agreement import Agreement, check, compare_forwards, named_tensors
from makd.export.examples import Inputs, check_one_attention, examples, forward_names
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
    check_one_attention(model)
    path = Path(folder) / "model.pt2"
    names = forward_names(model, tokenizer)
    with in_eval(model):
        with exporting("A torch program"):
            torch.export.save(_trace(_Plain(model), next(examples(model, names))), str(path))
            loaded = torch.export.load(str(path)).module()
        with exporting("Running the torch program"):
            agreement = compare_forwards(loaded, model, names)
    if model.dtype == torch.float32:
        check(agreement, tolerance, "torch program")
    return agreement


def _trace(plain: _Plain, inputs: Inputs) -> torch.export.ExportedProgram:
    """Trace with transformers' own patches for what torch.export stumbles over, rows and tokens left open."""
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    rows_and_tokens = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = dict.fromkeys(inputs, rows_and_tokens)
    config = DynamoConfig(dynamic_shapes=shapes)
    program, _ = DynamoExporter().export_program(plain, copy.deepcopy(inputs), config)  # type: ignore[arg-type]
    return program
