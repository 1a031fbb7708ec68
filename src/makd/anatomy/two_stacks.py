"""What an encoder-decoder asks of its input besides ids and a mask, by its head.

One that classifies a text reads it in both stacks: its decoder a place later, which transformers does where it is given
nothing for it. BART and its relatives classify what stands at the end-of-text token, which each row has to have.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def reads_itself_later(model: PreTrainedModel) -> bool:
    """Whether the decoder reads what the encoder does, a place later: with a head that writes no text."""
    return bool(model.config.is_encoder_decoder) and not model.can_generate() and model.base_model is not model


def with_end_of_text(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """`ids` (rows, tokens) as a classifier of two stacks can read them: one end-of-text token a row, at its end."""
    end = getattr(model.config, "eos_token_id", None)
    if not reads_itself_later(model) or not isinstance(end, int):
        return ids
    other = torch.where(ids == end, end - 1 if end else end + 1, ids)
    other[:, -1] = end
    return other
