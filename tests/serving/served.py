"""Started by `test_vllm` in a process of its own: what vLLM makes of students' folders, one after the other.

python served.py JOBS OUTPUT

JOBS is JSON: name -> [folder, task, arguments of vllm.LLM], where the task is generate or embed. OUTPUT gets, as JSON,
name -> {"made": ...} or {"error": what was raised}.
"""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

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


def serve(folder, task, settings):
    """One engine, from its start to its end."""
    try:
        llm = LLM(folder, max_model_len=32, max_num_seqs=4, seed=0, **settings)
        processes = llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
        return {"made": {"generate": generate, "embed": embed}[task](llm), "processes": processes}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(jobs, output):
    """All of them."""
    made = {}
    for name, job in json.loads(Path(jobs).read_text()).items():
        made[name] = serve(*job)
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(output).write_text(json.dumps(made))


if __name__ == "__main__":  # each of vLLM's processes imports this file, too
    main(*sys.argv[1:])
