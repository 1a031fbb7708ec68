"""How transformers saves and loads a student: as an ordinary model, without remote code.

The ranks stand in `config.json` under `quantization_config`, transformers' place for "the modules of this checkpoint
are not those of the architecture". Importing makd registers a quantizer (`registration`) that puts `LowRankLinear`s
(and, in very small students, factored embeddings and `SkippedLayer`s) where the config says so before the weights are
read. After that nothing of it stays on the model: a student is not "quantized", and `.half()`, `.float()`, the Trainer
and every head work as on any other model. A student whose factors another method quantizes has a loader in `quantized`.

    `config`: what the config says -> `placing`: modules in an empty model -> `stored`: what the files must hold
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from makd.anatomy import SkippedLayer, StandIn
from makd.student.adaptive_embedding import AdaptiveEmbedding
from makd.student.config import Bands, StudentConfig
from makd.student.counting import check_parameters, count_parameters, is_own_linear
from makd.student.embedding import LowRankEmbedding
from makd.student.experts import FactoredStack
from makd.student.identity import (
    Shapes,
    file_names,
    file_names_of_any_head,
    identity_tensor,
    make_identity,
    saved_tensors,
)
from makd.student.placing import place_stand_ins_
from makd.student.shared_linear import settle_groups_
from makd.student.stored import check_factors, check_identity, check_orders, check_shapes, check_tensors, read_shapes
from makd.weights.shards import weight_files

ALIGNMENT = 64
"""Bytes: torch's own memory begins at multiples of it, and the widest vector registers read so much at a time."""
NAMED_AS_IN_MEMORY = 4
"""The first format whose files have the names in memory; older ones have what transformers made of those."""


class StudentLoader(HfQuantizer):
    """Puts factored linears into an empty model before its weights are read, and checks before and after."""

    requires_calibration = False
    student: StudentConfig
    """What is loaded; `quantization_config` is that of the method that transformers sees."""

    def __init__(self, config: StudentConfig, **arguments: Any) -> None:
        """For the student that `config` describes."""
        super().__init__(config, **arguments)
        self.student = config

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Changes nothing: it is the first that transformers tells of a folder, before it follows the index there."""
        _check_index_of(config)
        return super().update_attn_implementation(config)  # type: ignore[no-any-return]

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """What is done to names and tensors on their way from a file into `model`."""
        if self.student.format < NAMED_AS_IN_MEMORY:
            return weight_conversions
        return [file_names_of_any_head(model), *self.get_weight_conversions()]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **arguments: Any
    ) -> PreTrainedModel:
        _check_index_of(model.config)  # again: only now the folder is known where a model's own class loads it
        # the caller is inside `torch.device("meta")`: no memory is taken here
        files = None if checkpoint_files is None else list(checkpoint_files)
        self._place(model, None if files is None else read_shapes(files))
        super()._process_model_before_weight_loading(model, checkpoint_files=files, **arguments)
        return model

    def _place(self, model: PreTrainedModel, shapes: Shapes | None) -> None:
        """Put stand-ins into `model`, and look whether the files have what they need."""
        place_stand_ins_(model, self.student)
        if shapes is not None:
            check_factors(shapes, model, self.student)
        if self.student.format < NAMED_AS_IN_MEMORY:
            for module in _stand_ins(model):  # their files have no identities, and transformers shall not miss them
                module.register_buffer("identity", module.identity, persistent=False)
        elif shapes is not None:
            check_shapes(shapes, model)
            check_tensors(shapes, model, self.student)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **arguments: Any) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **arguments)
        check_parameters(model, self.student)
        check_orders(model)
        _align_(model)
        self._leave(model)
        if self.student.identity is None:  # of an older format
            mark_student(model)
        else:
            check_identity(model, self.student)
            describe_student(model, self.student.identity)  # perhaps under another head: with its names and counts
        return model

    def _leave(self, model: PreTrainedModel) -> None:
        """What happens to `model` when all of it is there."""


class PlainStudentLoader(StudentLoader):
    """Loads a student whose factors are plain numbers."""

    def _leave(self, model: PreTrainedModel) -> None:
        """Take itself off `model`, which is an ordinary one."""
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.__dict__.pop("is_quantized", None)
                module.__dict__.pop("quantization_method", None)
        model.__dict__.pop("hf_quantizer", None)

    def is_serializable(self) -> bool:
        """Whether a student can be saved: it can."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether a student can be trained: its factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether a student can be trained; the Trainer asks while a model still counts as quantized."""
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
    ranks = {name: module.rank for name, module in modules.items() if is_own_linear(student, module)}
    embeddings: dict[str, int | Bands] = {
        name: module.rank for name, module in modules.items() if isinstance(module, LowRankEmbedding)
    }
    embeddings |= {
        name: {"rows": list(module.rows), "ranks": list(module.ranks)}
        for name, module in modules.items()
        if isinstance(module, AdaptiveEmbedding)
    }
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
        ranks, counts, architecture, embeddings, dropped, shared, experts, identity, quantization_of(student)
    )
    for module in _stand_ins(student):
        if module.identity.device.type != "meta":
            module.register_buffer("identity", identity_tensor(identity).to(module.identity.device))
    # transformers undoes these when it saves, and nothing else: what it makes of the architecture's own names and
    # tensors, such as one matrix of queries, keys and values, cannot be made of factors
    student._weight_conversions = [file_names(student)]  # type: ignore[assignment]


def quantization_of(student: PreTrainedModel) -> QuantizationConfigMixin | None:
    """How another method quantized the factors of `student`; None where they are plain numbers."""
    loader = getattr(student, "hf_quantizer", None)
    if not isinstance(loader, StudentLoader) or loader.quantization_config is loader.student:
        return None
    return loader.quantization_config


def is_student(model: PreTrainedModel) -> bool:
    """Whether `model` has factored matrices or dropped layers."""
    return bool(_stand_ins(model))


def _stand_ins(model: nn.Module) -> list[StandIn]:
    return [module for module in model.modules() if isinstance(module, StandIn)]


def _align_(model: PreTrainedModel) -> None:
    """Move weights that stand in the mapped file at an odd address to memory of their own.

    Some processors' matrix products round otherwise there: the student would not be the same bit for bit.
    """
    for parameter in model.parameters():
        if hasattr(parameter, "__tensor_flatten__"):  # codes and scales, which know themselves as one tensor
            for part in parameter.__tensor_flatten__()[0]:
                setattr(parameter, part, _aligned(getattr(parameter, part)))
        elif parameter.device.type == "cpu":
            parameter.data = _aligned(parameter.data)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT else tensor
