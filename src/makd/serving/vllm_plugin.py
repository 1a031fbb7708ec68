"""The entry point `vllm.general_plugins` of makd: vLLM calls it once in each of its processes."""


def register() -> None:
    """Make the quantization method "makd" known to vLLM. It may be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from makd.serving.vllm_config import ServedStudent
    from makd.student.config import METHOD

    register_quantization_config(METHOD)(ServedStudent)
