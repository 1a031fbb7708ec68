"""Station 7: batches with several texts in one row, which only some models read each on its own.

`position_ids` that begin anew say where a text begins. transformers' causal models go by them if they have no mask and
take positions at all; one that does not (BLOOM, MPT, encoders) lets each text read the ones before it, without a word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.sizes import embedding_shape
from makd.errors import SettingError

_TEXT = 3
"""Tokens of each of the two texts that are tried."""


@dataclass
class PackedTexts:
    """Whether models read texts of one row apart: tried at the first batch that has positions, by all processes."""

    models: Sequence[PreTrainedModel]
    across: list[str] | None = None
    """Classes of those that read across; None until they are tried."""

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse a batch whose texts a model would not read apart.

        Raises:
            SettingError: the position ids of a row begin anew, and a model reads each text with those before it.
        """
        positions = inputs.get("position_ids")
        if positions is None or positions.dim() != 2:
            return
        if self.across is None:
            masked = "attention_mask" in inputs
            found = [type(model).__name__ for model in self.models if reads_across(model, masked=masked)]
            self.across = list(dict.fromkeys(found))
        if self.across and is_packed(inputs):
            raise SettingError(
                "A batch has several texts in a row (its position_ids begin anew), and "
                f"{' and '.join(self.across)} would read each with those before it. Give each text a row of its own, "
                "padded; or, of a causal model that takes position_ids, give no attention_mask beside them."
            )


@torch.no_grad()
def reads_across(model: PreTrainedModel, *, masked: bool) -> bool:
    """Whether the second of two texts in a row is read otherwise than alone; a few tokens are enough.

    Args:
        model: that is no encoder-decoder, whose row is one text in any case.
        masked: whether an attention mask, of ones, is given besides.
    """
    if model.config.is_encoder_decoder:
        return False
    device = next(model.get_input_embeddings().parameters()).device
    tokens = torch.arange(1, 2 * _TEXT + 1, device=device).remainder(embedding_shape(model)[0])[None]
    positions = torch.arange(_TEXT, device=device).repeat(2)[None]
    mask = {"attention_mask": torch.ones_like(tokens)} if masked else {}
    with in_eval(model), without_cache(model):
        together = model(input_ids=tokens, position_ids=positions, **mask)[0][:, _TEXT:].float()
        later = {name: value[:, _TEXT:] for name, value in mask.items()}
        alone = model(input_ids=tokens[:, _TEXT:], position_ids=positions[:, _TEXT:], **later)[0].float()
    rough = model.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(device.type)
    return not float((together - alone).norm()) <= (5e-2 if rough else 1e-3) * float(alone.norm())


def is_packed(inputs: Mapping[str, Tensor]) -> bool:
    """Whether a batch has several texts in a row: its positions fall within one, between real tokens."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None or positions.dim() != 2:
        return False
    falls = positions[:, 1:] < positions[:, :-1]
    if mask is not None and mask.shape == positions.shape:
        falls = falls & mask[:, 1:].bool() & mask[:, :-1].bool()
    return bool(falls.any())
