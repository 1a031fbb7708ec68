"""Station 7: what is a model's own in one that peft has wrapped, so that it can learn or teach with its adapters.

A `PeftModel` is a module around a model, in whose place some linears have adapters. Its forward is the model's, so a
forward goes through it as through any engine; layers, head and config are looked for in the model inside.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from makd.distill.losses.projections import Projections
from makd.errors import SettingError


def inside(model: nn.Module, whose: str) -> PreTrainedModel:
    """The model that peft has wrapped, adapters in it; `model` itself where it is one of transformers'.

    Args:
        model: student or teacher.
        whose: how a person calls it, such as "student".

    Raises:
        SettingError: adapters are put before the tokens, whose rows then differ from the other model's, or are mixed;
            or something else is around the model, as `torch.compile` and `DataParallel` put it.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if not is_wrapped(model):
        advice = "Give the model of transformers itself"
        if hasattr(model, "_orig_mod"):
            advice += ", as torch.compile was given it: losses are made inside its forward"
        raise SettingError(f"The {whose} is of the class {type(model).__name__}, whose layers are not known. {advice}.")
    wrapped: Any = model
    if not hasattr(wrapped, "get_base_model"):
        raise SettingError(
            f"The {whose} is a {type(model).__name__}, which no Trainer saves. Give a PeftModel, as "
            "get_peft_model makes it."
        )
    if wrapped.active_peft_config.is_prompt_learning:
        raise SettingError(
            f"The {whose} has adapters of the kind {wrapped.peft_type.value}, which stand before its tokens: teacher "
            "and student would not be compared token by token. Take LoRA, or another kind that changes linears."
        )
    own: PreTrainedModel = wrapped.get_base_model()
    return own


def is_wrapped(model: nn.Module) -> bool:
    """Whether `model` is one of peft's; known by what it has, since peft may not be here."""
    return hasattr(model, "peft_config") and hasattr(model, "base_model") and not isinstance(model, PreTrainedModel)


def check_kept(model: nn.Module, projections: Projections | None) -> None:
    """Refuse what would be lost in a checkpoint, where peft keeps nothing but adapters.

    Raises:
        SettingError: projections are to learn with the adapters.
    """
    if projections is not None and is_wrapped(model):
        raise SettingError(
            f"The plan compares {', '.join(map(repr, projections.maps))} of other widths by projections, which learn "
            "with the student, and a PeftModel's checkpoints hold adapters alone. Give the student without adapters."
        )
