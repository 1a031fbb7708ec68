"""How much memory and time does `makd factorize --stream` take, on a teacher that its address space could not hold?

    python benchmarks/stream.py --work /tmp/stream                    # 3.6 B parameters; 20 GB of disk, many hours
    python benchmarks/stream.py --work /tmp/stream --layers 6         # the first layers of it, and what all would take
    python benchmarks/stream.py --work /tmp/stream --shape small      # the same in some minutes
    python benchmarks/stream.py --cost                                # seconds of a matrix by its shape, extrapolated

Each run adds a JSON line, with date and machine, to benchmarks/results/stream.jsonl; the last line of stdout is it.
A synthetic checkpoint (random bfloat16 weights, written shard by shard) is made in the folder of --work, and removed.
A run that was stopped goes on where it was; its line says how many matrices were there before.
"""

import argparse
import datetime
import json
import math
import os
import platform
import pydoc_data.topics
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "stream.jsonl"
GIB = 2**30
SHAPES = {
    # name: hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (256, 688, 4, 8, 4, 512),
    "small": (1024, 2816, 8, 16, 8, 32000),
    "3b": (3072, 8192, 28, 24, 8, 128256),  # Llama 3.2 3B, with a head of its own: 3.6 B
    "7b": (4096, 11008, 32, 32, 32, 32000),  # Llama 2 7B
    "70b": (8192, 28672, 80, 64, 8, 32000),  # Llama 2 70B
}
SIDES = (512, 768, 1024, 1536, 2048, 3072, 4096)
"""Of the matrices that are timed."""
SHARD = 2 * 10**9
"""Bytes of a shard of the synthetic checkpoint, about."""


def linears(shape: str) -> dict[tuple[int, int], int]:
    """(out, in) of a model's factorizable matrices -> how many there are."""
    hidden, intermediate, layers, heads, key_heads, _ = SHAPES[shape]
    narrow = hidden // heads * key_heads
    counts: dict[tuple[int, int], int] = {}
    for matrix in (
        [(hidden, hidden)] * 2 + [(narrow, hidden)] * 2 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    ):
        counts[matrix] = counts.get(matrix, 0) + layers
    return counts


def make_checkpoint(folder: Path, shape: str, count: int | None = None) -> None:
    """Random weights with the standard deviation that keeps activations level; a piece in memory at a time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from makd.weights.files import Source, write_tensors

    hidden, intermediate, layers, heads, key_heads, vocabulary = SHAPES[shape]
    layers = count or layers
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, max_position_embeddings=2048, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, parameter in empty.named_parameters():
        if size > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tuple(parameter.shape)
        size += 2 * parameter.numel()

    def source(shape: tuple[int, ...], seed: int) -> Source:
        def pieces() -> Iterator[torch.Tensor]:
            generator = torch.Generator().manual_seed(seed)
            if len(shape) == 1:
                yield torch.ones(shape, dtype=torch.bfloat16)
                return
            for start in range(0, shape[0], 1024):
                rows = torch.randn(min(1024, shape[0] - start), shape[1], generator=generator)
                yield rows.mul_(shape[1] ** -0.5).to(torch.bfloat16)

        return Source(torch.bfloat16, shape, pieces)

    weight_map, seed = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        sources = {}
        for name, tensor_shape in shard.items():
            seed += 1
            sources[name], weight_map[name] = source(tensor_shape, seed), file
        write_tensors(folder / file, sources)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_tokenizer(folder: Path, size: int) -> None:
    """Word pieces of the text that Python has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=min(size, 8000), special_tokens=special, show_progress=False)
    words.train_from_iterator(list(pydoc_data.topics.topics.values()), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]"
    ).save_pretrained(folder)


def factorize(work: Path, options: argparse.Namespace) -> dict[str, object]:
    """Run the command in a process of its own, and see what it took."""
    teacher, student = work / options.shape, work / f"{options.shape}-{options.solver}"
    layers = options.layers or SHAPES[options.shape][2]
    stored = sum(path.stat().st_size for path in teacher.glob("*.safetensors"))
    limit = int(options.limit * GIB)
    if stored < limit:
        print(
            f"note: {stored / GIB:.1f} GiB of weights would fit into the limit of {options.limit} GiB", file=sys.stderr
        )
    command = [
        sys.executable, "-m", "makd", "factorize", "--stream", "--teacher", str(teacher), "--output", str(student),
        "--budget.keep_linears", str(options.keep), "--data.path", "pydoc",
        "--data.max_length", str(options.tokens),
        "--data.rows", "20000", "--recipe.dtype", options.dtype, "--recipe.device", "cpu",
        "--recipe.factorize.solver", options.solver, "--recipe.factorize.ranks", options.ranks,
        "--recipe.calibration.rows", str(options.rows), "--recipe.calibration.batch_size", "1",
    ]  # fmt: skip
    before = len(list((work / f".{student.name}.makd" / "factorization").glob("*/spectra/*.safetensors")))
    started = time.perf_counter()
    process = subprocess.Popen(
        command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)), stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    metrics = json.loads((student / "metrics.json").read_text())
    largest = max(m * n for m, n in linears(options.shape))
    row: dict[str, Any] = {
        "what": "run", "shape": options.shape, "solver": options.solver, "ranks": options.ranks, "keep": options.keep,
        "dtype": options.dtype, "calibration": [options.rows, options.tokens], "parameters": metrics["params"]["total"],
        "bytes": metrics["bytes"], "address_space_limit": limit, "peak_rss": usage.ru_maxrss * 1024,
        "largest_linear_bytes": {"bfloat16": 2 * largest, "float64": 8 * largest},
        "layers": layers, "of_layers": SHAPES[options.shape][2], "matrices_before": before,
        "seconds": round(seconds, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "stages": {name: round(value, 1) for name, value in metrics["seconds"].items()},
    }  # fmt: skip
    hours = row["cpu_seconds"] * SHAPES[options.shape][2] / layers / 3600
    row["whole_cpu_hours"] = None if before else round(hours, 2)  # seconds of a run that goes on are of its last part
    shutil.rmtree(student)
    return row


def decompose_once(solver: str, out_features: int, in_features: int) -> tuple[float, int]:
    """Processor seconds of one matrix, and bytes that it took at most, in a forked process."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        import torch

        from makd.solvers import decompose_svd, decompose_whitened

        weight = torch.randn(out_features, in_features).to(torch.bfloat16)
        gram = torch.eye(in_features, dtype=torch.float64) if solver == "whitened" else None
        before, started = _resident(), time.process_time()
        rank = out_features * in_features // (2 * (out_features + in_features))  # half of the weights, uniform ranks
        decomposition = decompose_svd(weight, rank) if gram is None else decompose_whitened(weight, gram, rank)
        decomposition.factors(rank)
        used = time.process_time() - started
        os.write(
            writer, json.dumps([used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before]).encode()
        )
        os._exit(0)
    os.wait()
    seconds, peak = json.loads(os.read(reader, 200))
    return seconds, peak


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def operations(solver: str, out_features: int, in_features: int) -> tuple[float, float]:
    """(multiplications of products and triangular factors, cube of the side that is diagonalized)."""
    terms = min(out_features, in_features)
    products: float = 2 * out_features * in_features * terms  # its own square, and the projection
    if solver == "whitened":
        products += out_features * in_features**2 + in_features**3 / 3
    if out_features > in_features:  # images of the vectors, and QR of them
        products += 3 * out_features * terms**2
    return float(products), float(terms**3)


def cost(largest: int) -> dict[str, object]:
    """Seconds of matrices by shape, the model fitted to them, and whole models by it."""
    import numpy as np

    import makd.solvers  # noqa: F401 - imported before the forks

    sides = [side for side in SIDES if side <= largest]
    row: dict[str, object] = {"what": "cost"}
    for solver in ("svd", "whitened"):
        points = []
        for side in sides:
            for out_features, in_features in ((side, side), (side * 11 // 4, side), (side, side * 11 // 4)):
                if max(out_features, in_features) <= 2.75 * largest:
                    points.append((out_features, in_features, *decompose_once(solver, out_features, in_features)))
                    print(solver, *points[-1], file=sys.stderr)
        counts = np.array([operations(solver, m, n) for m, n, _, _ in points])
        seconds = np.array([point[2] for point in points])
        # relative errors count: small shapes are many in a model
        rates = np.linalg.lstsq(counts / seconds[:, None], np.ones(len(points)), rcond=None)[0]
        size = max(m * n for m, n, _, _ in points)  # libraries' own memory is little beside the largest
        memory = max(peak / (8 * m * n) for m, n, _, peak in points if m * n == size)
        models = {}
        for shape in ("3b", "7b", "70b"):
            found = sum(
                count * float(np.dot(operations(solver, m, n), rates)) for (m, n), count in linears(shape).items()
            )
            models[shape] = {"cpu_hours": found / 3600, "matrices": sum(linears(shape).values())}
        row[solver] = {
            "points": points, "seconds_per_multiplication": rates[0], "seconds_per_cube": rates[1],
            "largest_relative_miss": float(np.abs(counts @ rates / seconds - 1).max()),
            "peak_of_float64_matrix": memory, "models": models,
        }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--work", type=Path, help="folder for the checkpoint and the student")
    what.add_argument("--cost", action="store_true", help="time single matrices instead")
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="how many of the shape's layers; all of them if it is not given")
    parser.add_argument("--solver", default="auto", choices=("auto", "svd", "whitened"))
    parser.add_argument("--ranks", default="auto")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=64, help="blocks of calibration text")
    parser.add_argument("--tokens", type=int, default=256, help="of a block")
    parser.add_argument(
        "--dtype", default="bfloat16", help="that layers are run in; float32 where a processor multiplies no bfloat16"
    )
    parser.add_argument("--limit", type=float, default=8.0, help="address space of the process, GiB")
    parser.add_argument(
        "--largest", type=int, default=2048, help=f"with --cost: the largest side that is timed, {SIDES[0]} or more"
    )
    options = parser.parse_args()
    if options.largest < SIDES[0]:
        parser.error(f"--largest is at least {SIDES[0]}, the smallest side that is timed; got {options.largest}")
    if options.cost:
        row = cost(options.largest)
    else:
        teacher = options.work / options.shape
        if not (teacher / "model.safetensors.index.json").is_file():
            teacher.mkdir(parents=True, exist_ok=True)
            make_tokenizer(teacher, SHAPES[options.shape][-1])
            make_checkpoint(teacher, options.shape, options.layers)
        row = factorize(options.work, options)
        shutil.rmtree(teacher)
    import torch

    about = {
        "date": datetime.date.today().isoformat(), "machine": platform.machine(), "processor": _processor(),
        "processors": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "all"), "torch": torch.__version__,
        "memory_gib": math.floor(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB),
    }  # fmt: skip
    line = json.dumps({**about, **row})
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as results:
        results.write(line + "\n")
    print(line)


def _processor() -> str:
    import torch

    from makd.run_folder.record import describe_environment

    return str(describe_environment(torch.device("cpu"), 0)["processor"])


if __name__ == "__main__":
    main()
