"""What vLLM asks of a quantization method: which of a model's layers it runs, and how.

vLLM reads `quantization_config` of a student's config.json, finds `ServedStudent` by its method and asks it about every
layer that it builds. What cannot be run right is refused here, before weights are read.
"""

from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from makd.errors import ModelLoadError, UnsupportedModelError
from makd.serving.merged import WAY_OUT, find_merged
from makd.serving.vllm_linear import FactoredLinearMethod
from makd.student.config import METHOD, StudentConfig

FIRST_FORMAT = 4
"""Of students whose files have identities, and their own names in memory."""
REARRANGED = ("bloom", "gpt2")
"""Model types whose weights vLLM transposes or reorders, going by names, as it reads them: factors have such names."""
PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What linears are merged from where a model of vLLM does not say it (StableLM)."""


class ServedStudent(QuantizationConfig):  # type: ignore[misc]
    """A student's config, as vLLM asks for it."""

    def __init__(self, student: StudentConfig) -> None:
        """Refuses what vLLM cannot run.

        Raises:
            ModelLoadError: the student is of an old format.
            UnsupportedModelError: it has something besides factored linears.
        """
        super().__init__()
        _refuse(student)
        self.student = student
        self.names = {name: name for name in student.ranks}
        """The name that vLLM has for a linear -> the student's."""
        self.found: set[str] = set()
        """The student's linears that were met in vLLM's model."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ServedStudent":
        """From `quantization_config` in config.json.

        Raises:
            ModelLoadError: it is not as makd writes it.
            UnsupportedModelError: vLLM cannot run such a student.
        """
        return cls(StudentConfig.from_dict(config))

    def get_name(self) -> str:
        """The method's name."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Factors are ordinary matrices."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU: makd has no kernels of its own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All is in config.json."""
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse what the model is.

        Raises:
            UnsupportedModelError: vLLM would read its factors wrong.
        """
        model_type = getattr(hf_config, "model_type", None)
        if model_type in REARRANGED:
            raise UnsupportedModelError(
                f"vLLM rearranges the matrices of a {model_type} as it reads them, and would rearrange the factors of "
                f"{model_name!r}, too. {WAY_OUT}"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follow a renaming that vLLM does on the names of all weights."""
        renamed = {}
        for name, own in self.names.items():
            for new in hf_to_vllm_mapper.apply_list([name]):
                renamed[new] = own
        self.names = renamed

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How `layer`, which vLLM calls `prefix`, is run; None for vLLM's own way.

        Raises:
            UnsupportedModelError: it is factored, and cannot be run.
        """
        if isinstance(layer, VocabParallelEmbedding):
            if find_merged(prefix, (), self.student, self.names) is not None:
                raise _refusal(f"the LM head {prefix!r} is factored")
            return None
        if not isinstance(layer, LinearBase):
            return None
        parts = PARTS | self.packed_modules_mapping
        merged = find_merged(prefix, parts.get(prefix.rpartition(".")[2], ()), self.student, self.names)
        if merged is None:
            return UnquantizedLinearMethod()
        self._refuse_adapters()
        self.found.update(shard.name for shard in merged.shards if shard.rank is not None)
        return FactoredLinearMethod(merged, int(self.student.identity or "0", 16), self.check_found)

    def check_found(self) -> None:
        """Refuse a model of vLLM's without a place for some factors; a part of it, in a pipeline, need not have all.

        Raises:
            UnsupportedModelError: factors of some linear have no place in it.
        """
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None and vllm_config.parallel_config.pipeline_parallel_size > 1:
            return
        lost = [name for name in self.student.ranks if name not in self.found]
        if lost:
            raise _refusal(f"{lost[0]!r} and {len(lost) - 1} others have no linear in vLLM's model")

    def _refuse_adapters(self) -> None:
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None and vllm_config.lora_config is not None:
            raise UnsupportedModelError(
                "vLLM puts LoRA adapters on dense linears, and this student has factored ones. Merge the adapter into "
                f"the student before it is served, or leave enable_lora out. {WAY_OUT}"
            )


def _refuse(student: StudentConfig) -> None:
    if student.format < FIRST_FORMAT:
        raise ModelLoadError(
            f"This student was saved in makd's format {student.format}; vLLM needs format {FIRST_FORMAT} or later. "
            "Load it with transformers and save it again."
        )
    for found, what in (
        (student.embeddings, "token embeddings are factored"),
        (student.experts, "routed experts are factored"),
        (student.dropped, "layers were dropped"),
    ):
        if found:
            raise _refusal(f"{what} ({next(iter(found))!r})")


def _refusal(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"vLLM runs students with factored linears; in this one {what}. {WAY_OUT}")
