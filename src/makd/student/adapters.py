"""Which modules of a student adapters go on: a factored linear is two modules, and peft adapts each by its own name.

Stands beside `linear`. peft (LoRA and its relatives) looks for linears by the names of the architecture, `q_proj` or
`query`, and has no hook by which a module could say what of it is a linear. So the names are told beforehand.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from makd.anatomy import StandIn, is_adapted
from makd.errors import SettingError
from makd.kinds import takes
from makd.registry import unknown_name
from makd.student.adaptive_embedding import AdaptiveEmbedding, FactoredEmbedding
from makd.student.embedding import LowRankEmbedding
from makd.student.linear import LowRankLinear, used_twice

ALL_LINEAR = "all-linear"
"""peft's word for every linear but the head."""


@takes
def adapter_targets(student: PreTrainedModel, targets: str | Sequence[str] | None = None) -> list[str]:
    """`target_modules` for a config of peft that adapts the linears `targets` of `student` by their factors.

        LoraConfig(r=8, target_modules=makd.adapter_targets(student, ["q_proj", "v_proj"]))

    An adapter on each of two factors is merged into them exactly, and the student keeps its ranks; the sum of B A and
    one adapter has a higher rank than they have room for. An A that linears share which are not all among `targets`
    has none: it would change the others. What is dense goes by its own name.

    Args:
        student: as `makd.factorize` makes it or `from_pretrained` loads it; a model without factors does, too.
        targets: as peft takes them for the model that the student was made from: names, or how they end; a regular
            expression for whole names; `all-linear`, which leaves out embeddings and LM head; or None for peft's own
            choice of the architecture, which needs peft.

    Returns:
        Full names, in the order of the modules.

    Raises:
        SettingError: peft has no choice of its own for the architecture, or is not installed; or nothing in the student
            that adapters could go on is meant.
        UnknownNameError: a name in a list is that of no module that adapters could go on.
        UnsupportedModelError: weights of the token embeddings are meant that an LM head has too.
    """
    if targets is None:
        return _names(student, _choice_of_peft(student))
    if not isinstance(targets, str):
        adaptable = _adaptable(student)
        for target in targets:
            if not any(_ends(name, target) for name in adaptable):
                known = dict.fromkeys(name.rpartition(".")[2] for name in adaptable)
                raise unknown_name("linear to adapt", target, known)
    return _names(student, targets)


def factor_names(model: nn.Module, linears: Collection[str]) -> list[str]:
    """Full names of the factors of some of the factored linears of `model`, and of what is dense as it is.

    Args:
        model: whose modules are meant.
        linears: full names, also of single factors. An A that others share, which are not all among them, is left out.

    Raises:
        UnsupportedModelError: weights of the token embeddings are meant that an LM head has too.
    """
    modules = {name: model.get_submodule(name) for name in linears}
    chosen = set(modules.values())
    others = [
        module.reduce
        for module in model.modules()
        if isinstance(module, LowRankLinear) and module.shared is not None and module not in chosen
    ]
    found = set()
    for name, module in modules.items():
        if isinstance(module, LowRankEmbedding):
            found.add(f"{name}.table")
        elif isinstance(module, AdaptiveEmbedding):
            found |= {f"{name}.bands.{band}.table" for band in range(len(module.bands))}
        elif isinstance(module, LowRankLinear):
            found.add(f"{name}.expand")
            if "reduce" in dict(module.named_children()) and module.reduce not in others:  # followers have none
                found.add(f"{name}.reduce")
        else:
            found.add(name)
    users = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for name in found:
        module = model.get_submodule(name)
        weight = getattr(module, "base_layer", module).get_parameter("weight")
        if users[id(weight)] > 1:
            raise used_twice()
    return [name for name, _ in model.named_modules() if name in found]


def _names(student: PreTrainedModel, targets: str | Collection[str]) -> list[str]:
    adaptable = _adaptable(student)
    if targets == ALL_LINEAR:
        ends = (student.get_input_embeddings(), student.get_output_embeddings())
        meant = [
            name
            for name, module in adaptable.items()
            if module not in ends
            and not isinstance(module, nn.Embedding)
            and not isinstance(_holder(student, name), StandIn)
        ]
    elif isinstance(targets, str):
        meant = [name for name in adaptable if re.fullmatch(targets, name)]
    else:
        meant = [name for name in adaptable if any(_ends(name, target) for target in targets)]
    found = factor_names(student, meant)
    if not found:
        raise SettingError(
            f"Nothing in {type(student).__name__} that adapters could go on is meant by {targets!r}. Name linears of "
            f'it, such as {next(iter(adaptable), "none")}, or take "{ALL_LINEAR}".'
        )
    return found


def _adaptable(student: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> each linear or embedding, factored, dense or adapted already, and each single factor."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in student.named_modules():
        if name.startswith(inside):
            continue
        if is_adapted(module):
            inside += (f"{name}.",)
            found[name] = module
        elif isinstance(module, nn.Linear | Conv1D | nn.Embedding | LowRankLinear | FactoredEmbedding):
            found[name] = module
    return found


def _holder(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _choice_of_peft(student: PreTrainedModel) -> str | Collection[str]:
    try:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES
    except ImportError as error:
        raise SettingError("adapter_targets without targets asks peft: pip install 'makd[adapters]'.") from error
    kind = student.config.model_type
    if kind not in CHOICES:
        raise SettingError(
            f'peft has no choice of its own for {kind!r}. Name the linears to adapt, or take "{ALL_LINEAR}".'
        )
    choice: str | Collection[str] = CHOICES[kind]
    return choice
