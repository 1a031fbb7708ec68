"""An ONNX file behind the class of its model: what measures models measures files, too."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from makd.errors import ExportError
from makd.export.onnx_session import OnnxSession


def run_by(model: PreTrainedModel, session: OnnxSession) -> PreTrainedModel:
    """`model` again, whose forward is the file's: it takes what the model takes, and its outputs have the same names.

    Args:
        model: that the file was written of; it stays as it is, and the weights are not copied.
        session: of the file, an encoder's or a decoder's; a decoder reads from the first token on.
    """
    found: PreTrainedModel = copy.copy(model)

    def forward(**inputs: Any) -> ModelOutput:
        return ModelOutput(**_run(session, inputs))

    found.forward = forward
    return found


def _run(session: OnnxSession, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What the file puts out.

    Raises:
        ExportError: it is given a tensor that it does not take, which would change what the model computes.
    """
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    known = {
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    given = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}
    others = [name for name in given if name not in (*session.inputs, "attention_mask")]
    if others:
        raise ExportError(f"The ONNX file takes {', '.join(session.inputs)}; it cannot be given {', '.join(others)}.")
    found = session.run(session.empty_past(len(ids)) | known | given)
    return {name: value for name, value in found.items() if not name.startswith("present.")}
