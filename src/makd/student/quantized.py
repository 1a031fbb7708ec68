"""Loaders of students whose factors another method quantizes: torchao, or bitsandbytes.

Each is a `StudentLoader` and that method's own quantizer at once. The first puts factors into the empty model, then the
second does with them what it does with any linear; it stays on the model, which is as quantized as any other. What it
would leave alone or get wrong in a student without a word is refused.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import rename_source_key
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from makd.errors import ModelLoadError, UnsupportedModelError
from makd.student.adaptive_embedding import FactoredEmbedding
from makd.student.config import StudentConfig
from makd.student.counting import true_shape
from makd.student.experts import FactoredStack
from makd.student.hub import NAMED_AS_IN_MEMORY, StudentLoader, describe_student
from makd.student.identity import Shapes, file_names_of_any_head
from makd.student.linear import LowRankLinear
from makd.student.packed_rows import check_rows
from makd.student.placing import place_stand_ins_
from makd.student.stored import check_tensors, read_shapes

logger = logging.getLogger(__name__)


class QuantizedStudentLoader(StudentLoader):
    """What all of them have in common; a subclass is a method's own quantizer, too."""

    def __init__(self, config: StudentConfig) -> None:
        """For plain numbers that are to be quantized, or for files that hold quantized ones.

        Raises:
            ModelLoadError: the student is of an old format.
        """
        super().__init__(config, pre_quantized=config.asked is None)
        method = config.asked or config.quantization
        assert method is not None
        self.quantization_config = method
        if config.format < NAMED_AS_IN_MEMORY:
            raise ModelLoadError(
                f"This student was saved in makd's format {config.format}, from before students could be quantized. "
                "Load it without `quantization_config` and save it again first."
            )

    @staticmethod
    def get_modules_to_not_convert(
        model: PreTrainedModel,
        skip_modules: list[str] | None = None,
        keep_in_fp32_modules: Any = None,
        add_default_skips: bool = False,
    ) -> list[str]:
        """Those that transformers leaves out, and what is no linear but looks like one: factors of the vocabulary."""
        found = HfQuantizer.get_modules_to_not_convert(model, skip_modules, keep_in_fp32_modules, add_default_skips)
        vocabulary = [
            name
            for name, module in model.named_modules()
            if isinstance(module, FactoredEmbedding) or (isinstance(module, LowRankLinear) and module.tied)
        ]
        return [*found, *vocabulary]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **arguments: Any
    ) -> PreTrainedModel:
        files = None if checkpoint_files is None else list(checkpoint_files)
        if self.pre_quantized and files is not None:
            self._check_parts(read_shapes(files), files)
        super()._process_model_before_weight_loading(model, checkpoint_files=files, **arguments)
        return model

    def _place(self, model: PreTrainedModel, shapes: Shapes | None) -> None:
        if self.pre_quantized:
            place_stand_ins_(model, self.student)
            if shapes is not None:
                check_tensors({self._whole_name(name): () for name in shapes}, model, self.student)
        else:
            super()._place(model, shapes)
        self._check_possible(model)
        experts = next((name for name, module in model.named_modules() if isinstance(module, FactoredStack)), None)
        if experts is not None and not self.pre_quantized:
            logger.warning(
                "%s and other stacks of experts stay as they are: %s quantizes linears only.", experts, self._method
            )

    def _whole_name(self, name: str) -> str:
        """The parameter that a tensor in a file is a part of."""
        for parameter, parts in self.serialized_names.items():
            for part in parts:
                if name.endswith(f".{part}"):
                    return f"{name.removesuffix(part)}{parameter}"
        return name

    def _check_possible(self, model: PreTrainedModel) -> None:
        """Refuse a `model`, which is empty, that the method cannot do with what it was asked to."""

    def _check_parts(self, shapes: Shapes, files: Sequence[str]) -> None:
        """Refuse files that lack a part of a quantized matrix."""
        raise NotImplementedError

    def _is_quantized(self, weight: Tensor) -> bool:
        """Whether a weight that was loaded is made of codes."""
        raise NotImplementedError

    def _leave(self, model: PreTrainedModel) -> None:
        """Stay on `model`, if all of it is quantized that was to be, in the shapes that its config makes."""
        for name, linear in model.named_modules():
            if isinstance(linear, nn.Linear) and self.param_needs_quantization(model, f"{name}.weight"):
                shape = (linear.out_features, linear.in_features)
                if not self._is_quantized(linear.weight):
                    raise _plain(name) if self.pre_quantized else ModelLoadError(self._why_not(name, shape))
                if true_shape(linear.weight) != shape:
                    raise ModelLoadError(
                        f"{name}.weight has shape {tuple(true_shape(linear.weight))} in the weight files; config.json "
                        f"makes it {shape}. Weights and config are of different students: copy the student's folder "
                        "again, whole."
                    )
            elif isinstance(linear, FactoredStack) and any(map(self._is_quantized, linear.parameters())):
                raise UnsupportedModelError(
                    f"{name} is a stack of experts' factors, which cannot be run quantized. Leave experts out of the "
                    "quantization_config."
                )

    def _why_not(self, name: str, shape: tuple[int, int]) -> str:
        return (
            f"{name}, a linear of {shape[0]} x {shape[1]}, would not be quantized: {self._method} leaves out what does "
            "not fit it. Take another group size, or name the linear in `modules_to_not_convert` if it shall stay as "
            "it is."
        )

    @property
    def _method(self) -> str:
        return str(self.quantization_config.quant_method.value)

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """What is left after `dequantize` is a plain student."""
        super().remove_quantization_config(model)
        describe_student(model, str(self.student.identity))


class TorchAoStudentLoader(QuantizedStudentLoader, TorchAoHfQuantizer):
    """Factors in torchao's formats."""

    def _check_possible(self, model: PreTrainedModel) -> None:
        """Refuse a `model` with linears whose columns groups do not divide.

        Raises:
            UnsupportedModelError: groups do not divide a linear's columns, or a factored vocabulary shall be quantized.
        """
        config = self.quantization_config
        embeddings = next((name for name, part in model.named_modules() if isinstance(part, FactoredEmbedding)), None)
        if embeddings is not None and (config.include_input_output_embeddings or config.untie_embedding_weights):
            raise UnsupportedModelError(
                f"{embeddings} is factored, and factors of a vocabulary cannot be run quantized. Leave out "
                "include_input_output_embeddings and untie_embedding_weights."
            )
        self.modules_to_not_convert = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules
        )
        group = _group_size(config.quant_type)
        linears = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and self.param_needs_quantization(model, f"{name}.weight")
        ]
        odd = [(name, linear) for name, linear in linears if group and linear.in_features % group]
        if odd and not self.pre_quantized:
            name, linear = odd[0]
            raise UnsupportedModelError(
                f"Groups of {group} do not divide the {linear.in_features} columns of {name} ({len(odd)} of "
                f"{len(linears)} linears). Columns of a factor `expand` are the rank: factorize with a rank multiple "
                f"that holds (`factorize.rank_multiple {group}`), take a smaller group, or name these linears in "
                "`modules_to_not_convert`."
            )

    def _check_parts(self, shapes: Shapes, files: Sequence[str]) -> None:
        self.set_metadata(list(files))
        if "tensor_names" not in self.metadata:  # what torchao tells of codes
            raise _plain("all factors")
        for name, value in self.metadata.items():
            if "." not in name:
                continue
            module, _, leaf = name.rpartition(".")
            for part in json.loads(value).get("_tensor_data_names", ()):
                if f"{module}._{leaf}_{part}" not in shapes:
                    raise _lacks(f"{module}._{leaf}_{part}")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **arguments: Any
    ) -> PreTrainedModel:
        super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **arguments)
        if self.pre_quantized and checkpoint_files is not None:  # perhaps under another head: by its names
            names, state = file_names_of_any_head(model), model.state_dict()
            prefix = model.base_model_prefix
            renamed = {name: rename_source_key(name, [names], [], prefix, state)[0] for name in self.metadata}
            self.metadata = {renamed[name]: value for name, value in self.metadata.items()}
            tensors = json.loads(self.metadata["tensor_names"])
            self.metadata["tensor_names"] = json.dumps([renamed.get(name, name) for name in tensors])
        return model

    def _is_quantized(self, weight: Tensor) -> bool:
        return hasattr(weight, "__tensor_flatten__")


class Bnb4BitStudentLoader(QuantizedStudentLoader, Bnb4BitHfQuantizer):  # type: ignore[misc] # a name less there
    """Factors in the 4-bit formats of bitsandbytes."""

    def _check_parts(self, shapes: Shapes, files: Sequence[str]) -> None:
        parts = ["absmax", "quant_map", f"quant_state.bitsandbytes__{self.quantization_config.bnb_4bit_quant_type}"]
        if self.quantization_config.bnb_4bit_use_double_quant:
            parts += ["nested_absmax", "nested_quant_map"]
        for name in shapes:
            if name.endswith(".weight.absmax"):
                for part in parts:
                    if f"{name.removesuffix('absmax')}{part}" not in shapes:
                        raise _lacks(f"{name.removesuffix('absmax')}{part}")

    def _is_quantized(self, weight: Tensor) -> bool:
        return getattr(weight, "quant_state", None) is not None

    def _leave(self, model: PreTrainedModel) -> None:
        super()._leave(model)
        check_rows(model)
        # On processors with bfloat16 bitsandbytes repacks a matrix in the first forward of a model in eval mode. It
        # takes multiples of 64 only, rounds the scales, which are saved so, and passes no gradient from then on.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment] # no parameter


class Bnb8BitStudentLoader(QuantizedStudentLoader, Bnb8BitHfQuantizer):  # type: ignore[misc] # a name less there
    """Factors in the 8-bit format of bitsandbytes."""

    def _check_parts(self, shapes: Shapes, files: Sequence[str]) -> None:
        """Refuse nothing: a matrix without its scales is not taken for a quantized one when all is loaded."""

    def _is_quantized(self, weight: Tensor) -> bool:
        return getattr(weight, "SCB", None) is not None


LOADERS: Mapping[str, type[QuantizedStudentLoader]] = {
    "torchao": TorchAoStudentLoader,
    "bitsandbytes_4bit": Bnb4BitStudentLoader,
    "bitsandbytes_8bit": Bnb8BitStudentLoader,
}


def loader_for(config: StudentConfig) -> QuantizedStudentLoader:
    """The loader of a student whose factors are quantized, or are to be.

    Raises:
        ModelLoadError: by a method that is not known here.
    """
    method = config.asked or config.quantization
    assert method is not None
    name = str(getattr(method.quant_method, "value", method.quant_method))
    if name == "bitsandbytes":
        name = "bitsandbytes_8bit" if getattr(method, "load_in_8bit", False) else "bitsandbytes_4bit"
    if name not in LOADERS:
        raise ModelLoadError(
            f"A student's factors can be quantized by torchao or bitsandbytes, with a TorchAoConfig or a "
            f"BitsAndBytesConfig; got a {type(method).__name__}. For another method make the student dense first: "
            "`makd.fold(student)`."
        )
    return LOADERS[name](config)


def _group_size(quant_type: object) -> int | None:
    """Columns that share a scale, where a config of torchao says so."""
    told = (quant_type, *(getattr(quant_type, name, None) for name in ("granularity", "weight_granularity")))
    sizes = (getattr(one, "group_size", None) for one in told)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def _plain(what: str) -> ModelLoadError:
    return ModelLoadError(
        f"The weight files hold plain numbers of {what}; config.json says that they are quantized. They are of another "
        "student: copy the student's folder again, whole."
    )


def _lacks(name: str) -> ModelLoadError:
    return ModelLoadError(
        f"The weight files lack {name!r}, a part of a quantized matrix. They are not whole: copy the student's folder "
        "again."
    )
