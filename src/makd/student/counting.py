"""How many parameters a student has, and whether a load found those that its config counts.

Stands between the modules of a student and `hub`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy.sizes import whole_numbers
from makd.errors import ModelLoadError
from makd.student.adaptive_embedding import FactoredEmbedding
from makd.student.config import StudentConfig
from makd.student.embedding import is_tied_head
from makd.student.experts import FactoredStack
from makd.student.linear import LowRankLinear

FACTORED = LowRankLinear | FactoredEmbedding | FactoredStack


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of `model`, shared ones once: `total`, all factors' (`factored`) and the `vocabulary` matrices'.

    The order of tokens of an `AdaptiveEmbedding`, a whole number each, is in `total` and `vocabulary`.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    orders = whole_numbers(model)
    return {
        "total": sum(_numbers(p) for p in model.parameters()) + orders,
        "factored": _count_factors(model),
        "vocabulary": _count(end for end in ends if end is not None) + orders,
    }


def _count_factors(model: nn.Module) -> int:
    """Parameters of factored matrices that no other module holds too, as BERT's predictions hold the head's bias."""
    factored = [module for module in model.modules() if isinstance(module, FACTORED)]
    inside = {id(part) for module in factored for part in module.modules()}
    others = {
        id(parameter)
        for module in model.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    }
    found = {id(p): _numbers(p) for module in factored for p in module.parameters() if id(p) not in others}
    return sum(found.values())


def is_own_linear(model: nn.Module, module: nn.Module) -> bool:
    """Whether `module` is a factored linear with factors of its own: a tied LM head has the embeddings'."""
    return isinstance(module, LowRankLinear) and not is_tied_head(model, module)


def true_shape(parameter: Tensor) -> torch.Size:
    """Of the matrix that a parameter stands for: bitsandbytes packs two numbers into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.shape if packed is None else torch.Size(packed.shape)


def check_parameters(model: PreTrainedModel, config: StudentConfig) -> None:
    """Refuse a loaded `model` whose parameter counts are not those in its config.

    The vocabulary's matrices are left out (embeddings may be resized), and of students that have identities all that is
    no factor: which tensors there are is compared by name then, and a head may be a new one, of another size. Under
    another head than the saved one only the factored linears can be compared.

    Raises:
        ModelLoadError: the counts differ.
    """
    found, expected = count_parameters(model), config.parameters
    counted = config.identity is None and type(model).__name__ == config.architecture
    modules = list(model.modules())
    whole = len(config.ranks) == sum(is_own_linear(model, module) for module in modules) and len(
        config.embeddings
    ) == sum(isinstance(module, FactoredEmbedding) for module in modules)
    whole = whole and len(config.experts) == sum(isinstance(module, FactoredStack) for module in modules)
    checks = {}
    if whole:
        checks["parameters in factors"] = (found["factored"], expected["factored"])
    if counted:
        checks["parameters outside the vocabulary"] = (
            found["total"] - found["vocabulary"],
            expected["total"] - expected["vocabulary"],
        )
    for what, (have, want) in checks.items():
        if have != want:
            raise ModelLoadError(
                f"The loaded model has {have:,} {what}; its config.json says {want:,}. The files do not belong "
                "together, or were changed after saving: save the student again, with its config and weights at once."
            )


def _count(modules: Iterable[nn.Module]) -> int:
    return sum({id(p): _numbers(p) for module in modules for p in module.parameters()}.values())


def _numbers(parameter: Tensor) -> int:
    return true_shape(parameter).numel()
