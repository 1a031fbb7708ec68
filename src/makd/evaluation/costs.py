"""Station 8: what a model costs: parameters, bytes on disk, latency."""

import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, count_experts
from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.limits import token_limit
from makd.anatomy.sizes import embedding_shape, total_parameters
from makd.anatomy.two_stacks import with_end_of_text
from makd.evaluation.clock import wait
from makd.weights.shards import weight_files


def parameter_counts(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, int]:
    """`total`: every parameter once. `linears`: weights and biases of the linears, factored or not, and experts."""
    linears = {id(p): p.numel() for name in anatomy.linears for p in model.get_submodule(name).parameters()}
    experts = count_experts(model, anatomy)
    return {"total": total_parameters(model), "linears": sum(linears.values()) + experts}


def bytes_on_disk(folder: str | Path) -> int:
    """Bytes of the files in `folder` that its weights are read from."""
    return sum(path.stat().st_size for path in weight_files(Path(folder)))


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights of `model` if it were saved as it is, tied ones once."""
    tensors = {value.data_ptr(): value for value in model.state_dict().values()}
    return sum(value.numel() * value.element_size() for value in tensors.values())


def timed_tokens(models: Iterable[PreTrainedModel], tokens: int) -> int:
    """Tokens of a row that `latency` times where `tokens` are asked for: no more than any model has positions for."""
    return min(tokens, *(token_limit(model) or tokens for model in models))


@torch.no_grad()
def latency(
    models: dict[str, PreTrainedModel], batch_size: int, tokens: int = 128, repeats: int = 15
) -> dict[str, float]:
    """Median milliseconds of a forward of each model on one batch of `tokens` real tokens a row.

    All get as many as the model with the fewest positions has, if it has fewer than `tokens`: see `timed_tokens`.

    The models take turns, so that a machine that slows down or speeds up meanwhile does so for all of them.
    """
    inputs, length = {}, timed_tokens(models.values(), tokens)
    for name, model in models.items():
        vocabulary = embedding_shape(model)[0]
        ids = torch.randint(
            0, vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0), device="cpu"
        )
        ids = with_end_of_text(model, ids)
        inputs[name] = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
        if model.config.is_encoder_decoder:
            inputs[name]["decoder_input_ids"] = inputs[name]["input_ids"]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 2):
        for name, model in models.items():
            with without_cache(model), in_eval(model):  # on neither side: their configs may differ
                wait(model.device)
                start = time.perf_counter()
                model(**inputs[name])
                wait(model.device)
                if turn >= 2:  # the first calls set up kernels
                    seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}
