"""Whether bitsandbytes reads a student's 4-bit codes on this processor as what they say.

Factors `expand` have as many columns as the rank: fewer, and odder, than most linears that it was tried with.
"""

from copy import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from makd.errors import UnsupportedModelError


def check_rows(model: PreTrainedModel) -> None:
    """Refuse a `model` whose codes are read as other numbers than the same codes in one row, of any shape.

    The kernel for processors with AVX-512 takes wrong scales, and says nothing, where a block of codes goes over the
    end of a row: at 32 or 96 columns, say.

    Raises:
        UnsupportedModelError: the codes of some shape are read as other numbers.
    """
    shapes: dict[torch.Size, list[tuple[str, Any]]] = {}
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None and weight.device.type == "cpu":
            shapes.setdefault(torch.Size(state.shape), []).append((name.removesuffix(".weight"), weight))
    wrong = [one for same in shapes.values() if not _is_read_well(same[0][1]) for one in same]
    if wrong:
        name, weight = wrong[0]
        state = weight.quant_state
        raise UnsupportedModelError(
            f"bitsandbytes reads wrong numbers on this processor where rows are no multiple of its blocks of "
            f"{state.blocksize}: {name} has {state.shape[-1]} columns, and {len(wrong) - 1} more linears are such. "
            f"Columns of a factor `expand` are the rank: factorize with `factorize.rank_multiple {state.blocksize}`, "
            "load the student on a GPU, or name these linears in `llm_int8_skip_modules`."
        )


def _is_read_well(weight: Any) -> bool:
    from bitsandbytes.functional import dequantize_4bit

    one_row, shape = copy(weight.quant_state), torch.Size(weight.quant_state.shape)
    one_row.shape = torch.Size((1, shape.numel()))
    found = dequantize_4bit(weight.data, weight.quant_state)
    return torch.equal(found, dequantize_4bit(weight.data, one_row).reshape(shape))
