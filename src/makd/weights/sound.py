"""Station 3: whether a model's weights can be worked with: all of them here, plain, and finite.

Asked of every teacher and learner before work, and of every student before it is saved: a NaN in a weight makes no
error by itself, and scores such as an accuracy look like any other.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from makd.anatomy import is_adapted
from makd.errors import ModelLoadError, NumericsError
from makd.source_names import name_of
from makd.weights.finite import is_finite

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""dtypes of weights that are what they say; others (8-bit floats, integers) are codes of quantized ones."""


def check_finite(model: nn.Module, whose: str) -> None:
    """Refuse a model of which a weight is not finite; each is looked at once.

    Args:
        model: teacher, student or learner, with weights in memory.
        whose: how a person calls it, such as "The teacher".

    Raises:
        NumericsError: a parameter holds NaN or infinity, or a buffer NaN.
    """
    broken = _first_broken(model)
    if broken is not None:
        raise not_finite(broken, whose)


def check_learned(model: nn.Module) -> None:
    """Refuse a `model` that is not finite after its training, whose last step no loss has seen.

    Raises:
        NumericsError: a weight holds NaN or infinity.
    """
    broken = _first_broken(model)
    if broken is not None:
        raise NumericsError(
            f"Training diverged: {broken} of the {type(model).__name__} holds NaN or infinity after it. Lower "
            "training.learning_rate."
        )


def _first_broken(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            return name
    for name, buffer in model.named_buffers():  # masks may hold infinities
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            return name
    return None


def not_finite(name: str, whose: str = "The teacher") -> NumericsError:
    """The error for a tensor called `name` of a model that holds NaN or infinity."""
    return NumericsError(
        f"{whose}'s {name} holds NaN or infinity. Its checkpoint is damaged, or was stored or loaded in a dtype "
        "too narrow for it; load a sound one."
    )


def check_plain(model: PreTrainedModel) -> None:
    """Refuse a model in hand whose weights are not there, are on several devices, or are codes of numbers.

    Raises:
        ModelLoadError: it is quantized, some weights are not in memory (offloaded, or on the meta device), it is
            spread over devices, or was made in torch's inference mode.
    """
    check_numbers_of(model)
    check_in_memory(model)
    inference = next((name for name, weight in model.named_parameters() if weight.is_inference()), None)
    if inference is not None:
        raise ModelLoadError(
            f"{name_of(model)} was made inside torch.inference_mode(), so {inference} can take part in no gradient. "
            "Load the model outside of it."
        )
    places = sorted(set(map(str, getattr(model, "hf_device_map", {}).values())))
    if len(places) > 1:
        raise ModelLoadError(
            f"{name_of(model)} is spread over devices ({', '.join(places)}), and its hooks take what it reads there, "
            'wherever it is moved. Load it onto one device, as `device_map="cuda"` does; a teacher larger than a '
            "device can be streamed: `makd factorize --stream`."
        )


def check_in_memory(model: PreTrainedModel) -> None:
    """Refuse a model in hand of which some weights are not there.

    Raises:
        ModelLoadError: some are not: offloaded, or on the meta device.
    """
    absent = next((name for name, weight in model.named_parameters() if weight.is_meta), None)
    if absent is not None:
        raise ModelLoadError(
            f"The weights of {name_of(model)} are not in memory: {absent} is on the meta device, as offloading leaves "
            "it. Load the model onto one device, without `device_map`; a teacher larger than memory can be streamed: "
            "`makd factorize --stream`."
        )


def check_merged(model: PreTrainedModel) -> None:
    """Refuse a model in hand with adapters of peft's inside.

    Raises:
        ModelLoadError: a linear has one.
    """
    adapted = next((name for name, module in model.named_modules() if is_adapted(module)), None)
    if adapted is not None:
        raise ModelLoadError(
            f"{name_of(model)} has adapters: {adapted} is one of peft's layers. Merge them first: "
            "`PeftModel.from_pretrained(model, adapters).merge_and_unload()` of the model without them gives one."
        )


def check_numbers_of(model: PreTrainedModel) -> None:
    """Refuse a model in hand whose weights are codes of numbers.

    Raises:
        ModelLoadError: the model is quantized.
    """
    codes = next((name for name, weight in model.named_parameters() if not _holds_numbers(weight)), None)
    if codes is not None or getattr(model, "is_quantized", False):
        what = "" if codes is None else f" ({codes} is stored as {_stored_as(model.get_parameter(codes))})"
        raise ModelLoadError(
            f"{name_of(model)} holds quantized weights{what}; makd works on plain ones. Load its unquantized version, "
            "or call its `dequantize()` first."
        )


def _holds_numbers(weight: Tensor) -> bool:
    """Whether a weight is what its dtype says, and no tensor made of others, as torchao keeps its codes.

    DTensors, in which FSDP keeps a part of a weight, are made of one that is.
    """
    return weight.dtype in PLAIN and (isinstance(weight, DTensor) or not is_traceable_wrapper_subclass(weight))


def _stored_as(weight: Tensor) -> str:
    return str(weight.dtype) if weight.dtype not in PLAIN else type(weight.data).__name__


def dtypes_in(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that each parameter has in a model of `dtype`: what its architecture keeps in float32 stays so."""
    plan = model._get_dtype_plan(dtype)
    found = dict.fromkeys((name for name, _ in model.named_parameters()), dtype)
    for pattern, kept in plan.items():
        for name in found:
            if re.search(rf"(^|\.){pattern}(\.|$)", name):
                found[name] = kept
    return found


def round_weights_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the parameters of `model` to numbers of `dtype`, in which it will be saved; they keep their own."""
    for name, stored in dtypes_in(model, dtype).items():
        parameter = model.get_parameter(name)
        if parameter.dtype != stored:
            parameter.data = parameter.data.to(stored).to(parameter.dtype)


@contextmanager
def stored_in(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block the parameters of `model` have the dtype that they are saved in: see `round_weights_`."""
    before = {parameter: parameter.dtype for parameter in model.parameters()}
    set_dtypes_(model, dtype)
    try:
        yield
    finally:
        for parameter, own in before.items():
            parameter.data = parameter.data.to(own)


def set_dtypes_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the parameters of `model`, which may be empty, as `dtypes_in` says."""
    for name, wanted in dtypes_in(model, dtype).items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(wanted)
