"""Started by `test_vllm` in a process of its own: what vLLM makes of a student's folder, as JSON.

python served.py FOLDER TASK SETTINGS OUTPUT      TASK is generate or embed, SETTINGS are arguments of vllm.LLM
"""

import json
import sys

import torch
from vllm import LLM, SamplingParams

PROMPTS = [[5, 17, 33, 41, 9, 50], [7, 8, 21]]


def generate(llm):
    """Ids that were written, and the log-probabilities of the likeliest ones at each place."""
    settings = SamplingParams(max_tokens=8, temperature=0, logprobs=5, detokenize=False, ignore_eos=True)
    outputs = [output.outputs[0] for output in llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], settings)]
    return [
        {"ids": list(output.token_ids), "logprobs": [{t: p.logprob for t, p in at.items()} for at in output.logprobs]}
        for output in outputs
    ]


def embed(llm):
    """Embeddings of the prompts."""
    return [output.outputs.embedding for output in llm.embed([{"prompt_token_ids": ids} for ids in PROMPTS])]


if __name__ == "__main__":
    folder, task, settings, output = sys.argv[1:]
    llm = LLM(folder, max_model_len=32, max_num_seqs=4, seed=0, **json.loads(settings))
    made = {"generate": generate, "embed": embed}[task](llm)
    size = llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
    with open(output, "w") as file:
        json.dump({"made": made, "processes": size, "torch": torch.__version__}, file)
