"""How transformers saves and loads a student: as an ordinary model, without remote code.

The ranks stand in `config.json` under `quantization_config`, transformers' place for "the modules of this checkpoint
are not those of the architecture". Importing makd registers a quantizer that puts `LowRankLinear`s (and, in very small
students, a `LowRankEmbedding` and `SkippedLayer`s) where the config says so before the weights are read. After that
nothing of it stays on the model: a student is not "quantized", and `.half()`, `.float()`, the Trainer and every head
work as on any other model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from makd.anatomy import SkippedLayer, linear_shape
from makd.errors import ModelLoadError
from makd.lowrank.embedding import LowRankEmbedding, is_tied_head, rename_ties_, tied_head_names
from makd.lowrank.linear import LowRankLinear
from makd.lowrank.shared_linear import lead_, settle_groups_

METHOD = "makd"
FORMAT = 3
"""Version of what is stored; a reader refuses a higher one."""
FACTORS = (".reduce.weight", ".expand.weight", ".expand.bias", ".table.weight", ".directions.weight")
"""How the names of factors end in a file."""
ALIGNMENT = 64
"""Bytes: torch's own memory begins at multiples of it, and the widest vector registers read so much at a time."""


@register_quantization_config(METHOD)
class StudentConfig(QuantizationConfigMixin):
    """What a student's `config.json` says of it: which linears are factored at which rank, and its size.

    Args:
        ranks: name of a linear in the saved model -> its rank.
        parameters: counts that a load must find again: `factored` (all factors, with the biases of factored linears),
            `vocabulary` (token embeddings and LM head, which a user may resize) and `total`.
        architecture: class of the model that was counted.
        embeddings: name of factored token embeddings in the saved model -> their rank. An LM head that transformers
            ties to them has their factors, under any model class.
        shared: name of a linear in the saved model that holds the A of others too -> the names of those. Each has its
            rank in `ranks`.
        dropped: name of a layer that the student does without -> what it returned: 0 for its hidden states alone,
            else the length of a tuple.
        format: version of this layout.
        quant_method: always "makd"; transformers finds the quantizer by it.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        parameters: Mapping[str, int],
        architecture: str,
        embeddings: Mapping[str, int] | None = None,
        dropped: Mapping[str, int] | None = None,
        shared: Mapping[str, Sequence[str]] | None = None,
        format: int = FORMAT,
        quant_method: str = METHOD,
    ) -> None:
        if format > FORMAT:
            raise ModelLoadError(
                f"This student was saved in makd's format {format}; this makd reads up to {FORMAT}. Update makd."
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.ranks = dict(ranks)
        self.parameters = dict(parameters)
        self.architecture = architecture
        self.embeddings = dict(embeddings or {})
        self.dropped = dict(dropped or {})
        self.shared = {name: list(others) for name, others in (shared or {}).items()}
        self.format = format


@register_quantizer(METHOD)
class StudentLoader(HfQuantizer):
    """Puts factored linears into an empty model before its weights are read, and counts after."""

    requires_calibration = False
    quantization_config: StudentConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        if checkpoint_files is not None:
            _check_files(list(checkpoint_files), self.quantization_config)
        # the caller is inside `torch.device("meta")`: no memory is taken here
        for name, outputs in self.quantization_config.dropped.items():
            found = find_module_name(model, name, nn.Module)
            if found is not None:
                model.set_submodule(found, SkippedLayer.in_place_of(model.get_submodule(found), outputs))
        following = {other for others in self.quantization_config.shared.values() for other in others}
        for name, rank in self.quantization_config.ranks.items():
            found = None if name in following else find_module_name(model, name)
            if found is not None:
                _factor_linear_(model, found, rank, self.quantization_config.shared.get(name, ()))
        for name, rank in self.quantization_config.embeddings.items():
            found = find_module_name(model, name, nn.Embedding)
            if found is not None:
                _factor_embeddings_(model, found, rank)
        rename_ties_(model)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        check_parameters(model, self.quantization_config)
        _align_(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.__dict__.pop("is_quantized", None)
                module.__dict__.pop("quantization_method", None)
        model.__dict__.pop("hf_quantizer", None)
        return model

    def is_serializable(self) -> bool:
        """A student can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Its factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Asked for by the Trainer while a model still counts as quantized."""
        return True


def mark_student(student: PreTrainedModel) -> None:
    """Write into `student.config` what a load needs to build it again. Call after its modules were replaced."""
    shared = settle_groups_(student)
    modules = dict(student.named_modules())
    ranks = {name: module.rank for name, module in modules.items() if _is_own_linear(student, module)}
    embeddings = {name: module.rank for name, module in modules.items() if isinstance(module, LowRankEmbedding)}
    dropped = {name: module.outputs for name, module in modules.items() if isinstance(module, SkippedLayer)}
    if ranks or embeddings or dropped:
        counts, architecture = count_parameters(student), type(student).__name__
        student.config.quantization_config = StudentConfig(ranks, counts, architecture, embeddings, dropped, shared)
    else:
        student.config.__dict__.pop("quantization_config", None)  # all of it was folded: a plain model again


def is_student(model: PreTrainedModel) -> bool:
    """Whether `model` has factored matrices or dropped layers."""
    return any(isinstance(module, LowRankLinear | LowRankEmbedding | SkippedLayer) for module in model.modules())


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of `model`, shared ones once: `total`, all factors' (`factored`) and the `vocabulary` matrices'."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "factored": _count_factors(model),
        "vocabulary": _count(end for end in ends if end is not None),
    }


def _count_factors(model: nn.Module) -> int:
    """Parameters of factored matrices that no other module holds too, as BERT's predictions hold the head's bias."""
    factored = [module for module in model.modules() if isinstance(module, LowRankLinear | LowRankEmbedding)]
    inside = {id(part) for module in factored for part in module.modules()}
    others = {
        id(parameter)
        for module in model.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    }
    found = {id(p): p.numel() for module in factored for p in module.parameters() if id(p) not in others}
    return sum(found.values())


def _is_own_linear(model: nn.Module, module: nn.Module) -> bool:
    """Whether `module` is a factored linear with factors of its own: a tied LM head has the embeddings'."""
    return isinstance(module, LowRankLinear) and not is_tied_head(model, module)


def _factor_linear_(model: PreTrainedModel, name: str, rank: int, others: Sequence[str] = ()) -> None:
    """Put an empty factored linear in the place of a dense one, and of others (saved names) that share its A."""
    linear = model.get_submodule(name)
    out_features, in_features = linear_shape(linear)
    has_bias = getattr(linear, "bias", None) is not None
    leader = LowRankLinear(in_features, out_features, rank, has_bias, shared=bool(others))
    model.set_submodule(name, leader)
    if others:
        found = [find_module_name(model, other) or other for other in others]
        dense = [model.get_submodule(other) for other in found]
        biases = [getattr(other, "bias", None) is not None for other in dense]
        followers = lead_(leader, [linear_shape(other)[0] for other in dense], biases)
        for other, follower in zip(found, followers, strict=True):
            model.set_submodule(other, follower)


def _factor_embeddings_(model: PreTrainedModel, name: str, rank: int) -> None:
    dense = model.get_submodule(name)
    assert isinstance(dense, nn.Embedding)
    heads = tied_head_names(model, name)
    model.set_submodule(name, LowRankEmbedding(dense.num_embeddings, dense.embedding_dim, rank, dense.padding_idx))
    for head in heads:
        _factor_linear_(model, head, rank)


def find_module_name(
    model: PreTrainedModel, saved_name: str, kind: type | UnionType = nn.Linear | Conv1D | LowRankLinear
) -> str | None:
    """The name that a module called `saved_name` in the saved model has in `model`, perhaps under another head.

    Under a head, names gain the base model's prefix; without one they lose it. None when `model` does not have that
    part at all (a T5 encoder has no decoder, a base model no LM head).

    Args:
        model: with the architecture's own modules.
        saved_name: of a module in the model that was saved.
        kind: what the module is.

    Raises:
        ModelLoadError: the part is there, but not the module.
    """
    prefix = f"{model.base_model_prefix}."
    names = dict(model.named_modules())
    candidates = (saved_name, prefix + saved_name, saved_name.removeprefix(prefix))
    for candidate in candidates:
        if isinstance(names.get(candidate), kind):
            return candidate
    for candidate in candidates:
        if candidate.split(".")[0] + "." != prefix and candidate.split(".")[0] in names:
            raise ModelLoadError(
                f"config.json says that {saved_name!r} is factored or dropped, but {type(model).__name__} has no such "
                f"{'linear' if kind == nn.Linear | Conv1D | LowRankLinear else 'module'}. The config and the model "
                "class do not fit together."
            )
    return None


def check_parameters(model: PreTrainedModel, config: StudentConfig) -> None:
    """Compare the counts of a loaded `model` with those in its config.

    The vocabulary's matrices are left out (embeddings may be resized). Under another head than the saved one only the
    factored linears can be compared.

    Raises:
        ModelLoadError: they differ.
    """
    found, expected = count_parameters(model), config.parameters
    same_class = type(model).__name__ == config.architecture
    modules = list(model.modules())
    whole = len(config.ranks) == sum(_is_own_linear(model, module) for module in modules) and len(
        config.embeddings
    ) == sum(isinstance(module, LowRankEmbedding) for module in modules)
    checks = {}
    if whole:
        checks["parameters in factors"] = (found["factored"], expected["factored"])
    if same_class:
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


def _align_(model: PreTrainedModel) -> None:
    """Move weights that stand in the mapped file at an odd address to memory of their own.

    Some processors' matrix products round otherwise there: the student would not be the same bit for bit.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def _check_files(checkpoint_files: list[str], config: StudentConfig) -> None:
    """Factored weights must stand in the files: a tensor that is missing would be filled at random by transformers.

    Raises:
        ModelLoadError: the files hold another number of factored parameters than the config says.
    """
    found = 0
    for file in checkpoint_files:
        if not file.endswith(".safetensors"):
            raise ModelLoadError(f"{file}: a student is stored as safetensors, and only so.")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(FACTORS):
                    found += math.prod(tensors.get_slice(name).get_shape())
    if found != config.parameters["factored"]:
        raise ModelLoadError(
            f"The weight files hold {found:,} parameters of factored linears; config.json says "
            f"{config.parameters['factored']:,}. The weights are not this student's: copy its folder again, whole."
        )


def _count(modules: Iterable[nn.Module]) -> int:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
