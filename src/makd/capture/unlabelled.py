"""Station 4: what a model is asked, without the answers."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def without_labels(model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Collection[str]) -> dict[str, Any]:
    """`inputs` without those that are named in `labels`; of an encoder-decoder, with the decoder's made from them."""
    found = {name: value for name, value in inputs.items() if name not in labels}
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None and "labels" in inputs and "decoder_input_ids" not in inputs:
        found["decoder_input_ids"] = prepare(labels=inputs["labels"])
    return found
