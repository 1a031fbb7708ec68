"""Latency of one more token at batch 1, with the keys and values of those before it kept: teacher against student."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from distilling.subjects import load


@torch.inference_mode()
def compare_decoding(place: Path, context: int, device: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Milliseconds a token of both, in turn, and the median of their ratios."""
    models = {which: load(place, which, "sdpa", dtype, device) for which in ("teacher", "student")}
    ids = torch.randint(1, models["teacher"].config.vocab_size, (1, context), device=device)
    caches = {which: DynamicCache(config=model.config) for which, model in models.items()}
    for which, model in models.items():
        model(input_ids=ids, cache=caches[which])
    rounds = max(8, repeats)
    seconds: dict[str, list[float]] = {which: [] for which in models}
    for _ in range(rounds + 2):
        for which, model in models.items():
            seconds[which].append(_one(model, ids[:, :1], caches[which], device))
    kept = {which: values[2:] for which, values in seconds.items()}
    ratios = [ours / theirs for ours, theirs in zip(kept["student"], kept["teacher"], strict=True)]
    return {
        "milliseconds": {which: round(1000 * statistics.median(values), 3) for which, values in kept.items()},
        "time_ratio": round(statistics.median(ratios), 3),
    }


def _one(model: PreTrainedModel, token: torch.Tensor, cache: DynamicCache, device: str) -> float:
    begun = time.perf_counter()
    model(input_ids=token, cache=cache)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun
