"""Station 8: a short text that says whether two models are the same, bit for bit."""

import hashlib

import torch
from transformers import PreTrainedModel

from makd.anatomy.eval_mode import in_eval
from makd.anatomy.sizes import embedding_shape
from makd.anatomy.two_stacks import with_end_of_text
from makd.kinds import takes
from makd.weights.finite import check_outputs

TOKENS = 32


@takes
@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of the outputs of `model` (states or logits, as raw bytes) on fixed token ids.

    Equal on one machine with one number of threads if, and hardly but if, all weights are equal.

    Raises:
        NumericsError: the outputs hold NaN or infinity.
    """
    vocabulary = embedding_shape(model)[0]
    ids = with_end_of_text(model, torch.arange(2 * TOKENS).reshape(2, TOKENS) * 7919 % vocabulary).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with in_eval(model):
        output = model(**inputs)[0]
    check_outputs(output, f"The outputs of the {type(model).__name__}")
    return hashlib.sha256(output.float().cpu().contiguous().numpy().tobytes()).hexdigest()
