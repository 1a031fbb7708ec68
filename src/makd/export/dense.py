"""A student multiplied out: an ordinary model that any transformers loads, and what reads such (llama.cpp, vLLM)."""

import copy
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from makd.errors import ExportError
from makd.export.agreement import Agreement, check, compare_forwards
from makd.export.examples import forward_names
from makd.export.tracing import evaluating
from makd.student.folding import fold
from makd.student.hub import is_student


def save_dense(model: PreTrainedModel, folder: str | Path, *, tolerance: float = 1e-4) -> Agreement:
    """Write `model` with its factors multiplied out, as `save_pretrained` writes any model.

    `config.json` says some things twice, as transformers 5 and as those before it read them: without that the older
    ones would take another base for rotary positions, in silence.

    Args:
        model: a student; `model` itself is not changed.
        folder: that is there.
        tolerance: how far an output may be from the student's; only checked in float32.

    Returns:
        How far the outputs of what was written are from the student's.

    Raises:
        ExportError: a layer was dropped, which no dense layer stands for; or the outputs differ.
    """
    folder = Path(folder)
    folded = fold(model).eval()
    if is_student(folded):
        dropped = sorted(folded.config.quantization_config.dropped)
        raise ExportError(
            f"This student does without {len(dropped)} of its teacher's layers ({', '.join(dropped[:3])}, ...). No "
            "dense layer does nothing, so it cannot be multiplied out: export it to onnx or torch, or make one without "
            "dropped layers (factorize.depth)."
        )
    folded.save_pretrained(folder)
    _write_older_names(folder)
    again = type(folded).from_pretrained(folder, dtype=model.dtype).eval()
    with evaluating(model):
        agreement = compare_forwards(again, model, forward_names(model))
    if model.dtype == torch.float32:
        check(agreement, tolerance, "dense model")
    return agreement


def write_plain_config(model: PreTrainedModel, folder: Path) -> None:
    """Write `config.json` of the architecture alone, as runtimes read it beside a file that holds the factors."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    config.save_pretrained(folder)
    _write_older_names(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _write_older_names(folder: Path) -> None:
    """Add what transformers before 5 reads by other names: the base and scaling of rotary positions, the dtype."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    rotary = config.get("rope_parameters")
    if isinstance(rotary, dict) and not any(isinstance(value, dict) for value in rotary.values()):
        if "rope_theta" in rotary:
            config.setdefault("rope_theta", rotary["rope_theta"])
        if rotary.get("rope_type", "default") != "default":
            others = {name: value for name, value in rotary.items() if name != "rope_theta"}
            config.setdefault("rope_scaling", others)
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
