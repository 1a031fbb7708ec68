"""The ONNX files of a model, compared with it: one for an encoder or decoder, two for an encoder-decoder."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.eval_mode import in_eval
from makd.errors import ExportError
from makd.export.agreement import Agreement, check, compare, compare_forwards
from makd.export.examples import Inputs, check_one_attention, examples, input_names, is_decoder
from makd.export.onnx_graph import trace, trace_writing
from makd.export.onnx_session import PAST, OnnxSession
from makd.export.tracing import exporting

if TYPE_CHECKING:
    import onnx_ir

ONE_FILE = 1_500_000_000
"""Bytes of weights that stand in the file itself; beyond, protobuf may refuse it, and they stand beside it."""
Pair = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]


def save_onnx(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    quantize: str = "none",
    tolerance: float = 1e-4,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Agreement:
    """Write `model.onnx` into `folder`; of an encoder-decoder `encoder_model.onnx` and `decoder_model.onnx`.

    Args:
        model: in float32, on the CPU.
        folder: that is there.
        quantize: `none` or `int8`.
        tolerance: how far an output may be from the model's. Not of int8.
        tokenizer: says which inputs the model is given; see `input_names`.

    Returns:
        How far the file's outputs are from the model's, in ONNX Runtime, over inputs of several shapes.

    Raises:
        ExportError: it cannot be traced, or does not compute what the model computes.
        SettingError: a package is missing.
    """
    check_one_attention(model)
    folder, names = Path(folder), input_names(model, tokenizer)
    with in_eval(model):
        if model.config.is_encoder_decoder:
            agreement = _save_two(model, names, folder, quantize)
        elif is_decoder(model):
            agreement = _save_writing(model, names, folder, quantize)
        else:
            agreement = _save_reading(model, names, folder, quantize)
    if quantize == "none":
        check(agreement, tolerance, "ONNX file")
    return agreement


def write(program: "onnx_ir.Model", path: Path) -> None:
    """Write a graph with its weights, which stand beside it where one file cannot hold them."""
    import onnx_ir

    weights = sum(
        value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value is not None
    )
    onnx_ir.save(program, path, external_data=None if weights < ONE_FILE else f"{path.name}_data")


def _save_reading(model: PreTrainedModel, names: tuple[str, ...], folder: Path, quantize: str) -> Agreement:
    write(trace(model, next(examples(model, names)), quantize), folder / "model.onnx")
    with exporting("Running the ONNX file"):
        return compare_forwards(OnnxSession(folder / "model.onnx"), model, names)


def _save_writing(model: PreTrainedModel, names: tuple[str, ...], folder: Path, quantize: str) -> Agreement:
    write(trace_writing(model, next(examples(model, names)), quantize), folder / "model.onnx")
    with exporting("Running the ONNX file"):
        return compare(_compare_writing(model, names, folder))


@torch.no_grad()
def _compare_writing(model: PreTrainedModel, names: tuple[str, ...], folder: Path) -> Iterator[Pair]:
    """Each text read at once, and in two parts, the second with the keys and values of the first."""
    session = OnnxSession(folder / "model.onnx")
    for inputs in examples(model, names, seed=1):
        mask = inputs["attention_mask"]
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        taken = {name: value for name, value in inputs.items() if name in session.inputs}
        expected = model(**taken, return_dict=True).logits
        whole = session.run(taken | session.empty_past(len(mask)))
        yield {"logits": whole["logits"]}, {"logits": expected}, mask
        cut = mask.shape[1] // 2
        if cut:
            begun = session.run(_part(taken, 0, cut) | session.empty_past(len(mask)))
            past = {name: begun[name.replace(PAST, "present.")] for name in session.inputs if name.startswith(PAST)}
            ended = session.run(_part(taken, cut, mask.shape[1]) | past)
            yield {"logits": ended["logits"]}, {"logits": expected[:, cut:]}, mask[:, cut:]


def _part(inputs: Inputs, begin: int, end: int) -> Inputs:
    """Tokens from `begin` to `end`; a mask is of all up to there."""
    return {name: value[:, :end] if name == "attention_mask" else value[:, begin:end] for name, value in inputs.items()}


class _Decoder(nn.Module):
    """An encoder-decoder's decoder and head, with the names that optimum has for their inputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(
        self, input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> dict[str, Tensor]:
        """The logits (rows, tokens, vocabulary) of what follows `input_ids` (rows, tokens)."""
        found = self.model(
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            encoder_outputs=(encoder_hidden_states,),
            use_cache=False,
            return_dict=True,
        )
        return {"logits": found.logits}


def _save_two(model: PreTrainedModel, names: tuple[str, ...], folder: Path, quantize: str) -> Agreement:
    encoder = model.get_encoder()
    if encoder is None or not model.can_generate():
        raise ExportError(
            f"{type(model).__name__} is an encoder-decoder without a head that writes; ONNX files of those are not "
            "known to any runtime. Export it with --to dense."
        )
    first = next(examples(model, names))
    write(trace(encoder, first, quantize), folder / "encoder_model.onnx")
    with torch.no_grad():
        states = encoder(**first, return_dict=True).last_hidden_state
    written = first["input_ids"][:, :4]
    decoder_inputs = {
        "input_ids": written,
        "encoder_hidden_states": states,
        "encoder_attention_mask": first["attention_mask"],
    }
    write(trace(_Decoder(model), decoder_inputs, quantize), folder / "decoder_model.onnx")
    with exporting("Running the ONNX files"):
        return compare(_compare_two(model, names, folder))


@torch.no_grad()
def _compare_two(model: PreTrainedModel, names: tuple[str, ...], folder: Path) -> Iterator[Pair]:
    encoder, decoder = OnnxSession(folder / "encoder_model.onnx"), OnnxSession(folder / "decoder_model.onnx")
    for inputs in examples(model, names, seed=1):
        written = inputs["input_ids"].flip(1)[:, : max(1, inputs["input_ids"].shape[1] // 2)]
        states = encoder.run(inputs)["last_hidden_state"]
        found = decoder(
            input_ids=written, encoder_hidden_states=states, encoder_attention_mask=inputs["attention_mask"]
        )
        expected = model(**inputs, decoder_input_ids=written, use_cache=False, return_dict=True)
        yield {"logits": found["logits"]}, {"logits": expected.logits}, torch.ones_like(written)
