"""A model as an ONNX graph, by transformers' exporter, with inputs and outputs named as optimum looks for them.

Factors stay factors. The graph is fused for ONNX Runtime's CPU kernels by the exporter; on request its weights become
int8 by ONNX Runtime's own quantizer.
"""

import copy
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from makd.export.tracing import check_packages, exporting

if TYPE_CHECKING:
    import onnx_ir

PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
_PAST = re.compile(r"(input\.|output\.)?(?:cache|past_key_values)\.layers\.(\d+)\.(key|value)s")


def trace(model: nn.Module, inputs: Mapping[str, Tensor], quantize: str) -> "onnx_ir.Model":
    """The graph of one forward of `model`, for any number of rows and tokens.

    Raises:
        ExportError: the model cannot be traced.
        SettingError: a package is missing.
    """
    check_packages("An ONNX file", PACKAGES)
    with exporting("An ONNX file"):
        return _trace(model, copy.deepcopy(dict(inputs)), quantize)


def trace_writing(model: PreTrainedModel, inputs: Mapping[str, Tensor], quantize: str) -> "onnx_ir.Model":
    """The graph of a step of writing: reads tokens after those whose keys and values it is given, none at first.

    Inputs are `input_ids`, `attention_mask` (past and new), `position_ids` where the model takes them, and
    `past_key_values.N.key`; outputs are `logits` and `present.N.key`, as optimum has them. Keys and values of all
    earlier tokens are kept, also where a layer looks at the last ones alone: the mask sees to that.
    """
    check_packages("An ONNX file", PACKAGES)
    with exporting("An ONNX file with keys and values"):
        program = _trace(model, _second_step(model, inputs), quantize)
        for value in (*program.graph.inputs, *program.graph.outputs):
            value.name = _as_optimum(str(value.name))
        return program


@torch.no_grad()
def _second_step(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `model` is given for the later tokens of `inputs` after it has read the first ones."""
    taken = inspect.signature(model.forward).parameters
    keep = "cache" if "cache" in taken else "past_key_values"  # since transformers 5.24, and before
    mask, half = inputs["attention_mask"], inputs["attention_mask"].shape[1] // 2
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past = DynamicCache()
    begun = {"input_ids": inputs["input_ids"][:, :half], "attention_mask": mask[:, :half]}
    later = {"input_ids": inputs["input_ids"][:, half:], "attention_mask": mask}
    if "position_ids" in taken:
        begun["position_ids"], later["position_ids"] = positions[:, :half], positions[:, half:]
    model(**begun, **{keep: past}, use_cache=True)
    return {**later, keep: past, "use_cache": True}


def _trace(model: nn.Module, inputs: Any, quantize: str) -> "onnx_ir.Model":
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.quantizers.quantizer_onnxruntime import (
        OnnxRuntimeDynamicConfig,
        OnnxRuntimeQuantizer,
    )

    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True)) if quantize == "int8" else None
    config = OnnxConfig(dynamic=True, ort_fusions="cpu", quantizer=quantizer)
    with torch.no_grad():
        program: onnx_ir.Model = OnnxExporter().export(model, inputs, config).program  # type: ignore[arg-type]
    return program


def _as_optimum(name: str) -> str:
    found = _PAST.fullmatch(name)
    if found is None:
        return name.removeprefix("input.").removeprefix("output.")
    side, layer, what = found.groups()
    return f"{'present' if side == 'output.' else 'past_key_values'}.{layer}.{what}"
