"""How transformers saves and loads a student: as an ordinary model, without remote code.

The ranks stand in `config.json` under `quantization_config`, transformers' place for "the modules of this checkpoint
are not those of the architecture". Importing makd registers a quantizer that puts `LowRankLinear`s (and, in very small
students, a `LowRankEmbedding` and `SkippedLayer`s) where the config says so before the weights are read. After that
nothing of it stays on the model: a student is not "quantized", and `.half()`, `.float()`, the Trainer and every head
work as on any other model.

    `student_config`: what the config says -> `placing`: modules in an empty model -> `stored`: what the files must hold
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from makd.anatomy import SkippedLayer, StandIn
from makd.errors import ModelLoadError
from makd.student.config import METHOD, StudentConfig
from makd.student.embedding import LowRankEmbedding, is_tied_head
from makd.student.experts import FactoredStack
from makd.student.identity import file_names, file_names_of_any_head, identity_tensor, make_identity, saved_tensors
from makd.student.linear import LowRankLinear
from makd.student.placing import place_stand_ins_
from makd.student.shared_linear import settle_groups_
from makd.student.stored import check_factors, check_identity, check_tensors, read_shapes
from makd.weights.shards import weight_files

ALIGNMENT = 64
"""Bytes: torch's own memory begins at multiples of it, and the widest vector registers read so much at a time."""
FACTORED = LowRankLinear | LowRankEmbedding | FactoredStack
NAMED_AS_IN_MEMORY = 4
"""The first format whose files have the names in memory; older ones have what transformers made of those."""


@register_quantizer(METHOD)
class StudentLoader(HfQuantizer):
    """Puts factored linears into an empty model before its weights are read, and checks before and after."""

    requires_calibration = False
    quantization_config: StudentConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Changes nothing: it is the first that transformers tells of a folder, before it follows the index there."""
        _check_index_of(config)
        return config

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """What is done to names and tensors on their way from a file into `model`."""
        if self.quantization_config.format < NAMED_AS_IN_MEMORY:
            return weight_conversions
        return [file_names_of_any_head(model)]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        _check_index_of(model.config)  # again: only now the folder is known where a model's own class loads it
        # the caller is inside `torch.device("meta")`: no memory is taken here
        shapes = None if checkpoint_files is None else read_shapes(list(checkpoint_files))
        if shapes is not None:
            check_factors(shapes, config)
        place_stand_ins_(model, config)
        if config.format < NAMED_AS_IN_MEMORY:
            for module in _stand_ins(model):  # their files have no identities, and transformers shall not miss them
                module.register_buffer("identity", module.identity, persistent=False)
        elif shapes is not None:
            check_tensors(shapes, model, config)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        config = self.quantization_config
        check_parameters(model, config)
        _align_(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.__dict__.pop("is_quantized", None)
                module.__dict__.pop("quantization_method", None)
        model.__dict__.pop("hf_quantizer", None)
        if config.identity is None:  # of an older format
            mark_student(model)
        else:
            check_identity(model, config)
            describe_student(model, config.identity)  # perhaps under another head: with its names and counts
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


def _check_index_of(config: PreTrainedConfig) -> None:
    if config.name_or_path and Path(config.name_or_path).is_dir():
        weight_files(Path(config.name_or_path))


def mark_student(student: PreTrainedModel) -> None:
    """Write into `student.config` what a load needs to build it again, and give it an identity of its own.

    Call after modules were replaced, and before makd saves what it trained. A plain model is left as it is.
    """
    settle_groups_(student)
    tensors = saved_tensors(student)
    describe_student(student, make_identity((name, tuple(tensor.shape), tensor) for name, tensor in tensors.items()))


def describe_student(student: PreTrainedModel, identity: str) -> None:
    """Write config and identities, and how files shall call them; `student` may be empty."""
    shared = settle_groups_(student)
    modules = dict(student.named_modules())
    ranks = {name: module.rank for name, module in modules.items() if _is_own_linear(student, module)}
    embeddings = {name: module.rank for name, module in modules.items() if isinstance(module, LowRankEmbedding)}
    dropped = {name: module.outputs for name, module in modules.items() if isinstance(module, SkippedLayer)}
    if not is_student(student):
        if isinstance(getattr(student.config, "quantization_config", None), StudentConfig):  # all of it was folded
            del student.config.quantization_config
            student.__dict__.pop("_weight_conversions", None)
        return
    counts, architecture = count_parameters(student), type(student).__name__
    experts: dict[str, dict[str, int | str]] = {
        name: {"rank": module.rank, "shared": module.shared}
        for name, module in modules.items()
        if isinstance(module, FactoredStack)
    }
    student.config.quantization_config = StudentConfig(
        ranks, counts, architecture, embeddings, dropped, shared, experts, identity
    )
    for module in _stand_ins(student):
        if module.identity.device.type != "meta":
            module.register_buffer("identity", identity_tensor(identity).to(module.identity.device))
    # transformers undoes these when it saves, and nothing else: what it makes of the architecture's own names and
    # tensors, such as one matrix of queries, keys and values, cannot be made of factors
    student._weight_conversions = [file_names(student)]  # type: ignore[assignment]


def is_student(model: PreTrainedModel) -> bool:
    """Whether `model` has factored matrices or dropped layers."""
    return bool(_stand_ins(model))


def _stand_ins(model: nn.Module) -> list[StandIn]:
    return [module for module in model.modules() if isinstance(module, StandIn)]


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
    factored = [module for module in model.modules() if isinstance(module, FACTORED)]
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
    whole = whole and len(config.experts) == sum(isinstance(module, FactoredStack) for module in modules)
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


def _count(modules: Iterable[nn.Module]) -> int:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
