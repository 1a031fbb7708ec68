"""What other programs than transformers need to run a student: vLLM finds `vllm_plugin` by an entry point.

    vllm_plugin: registers -> vllm_config: which layer has which factors -> vllm_linear: a layer's weights, its product
    merged: which factors stand in a linear that a server has merged from several, and how it is multiplied

`vllm_*` import vLLM, `merged` does not.
"""
