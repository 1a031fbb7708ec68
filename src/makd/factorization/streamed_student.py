"""Station 3, streamed: a student's folder, as `save_pretrained` would write it, from what was kept on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.core_model_loading import dot_natural_key

from makd.anatomy import linear_shape
from makd.factorization.workfolder import WorkFolder
from makd.ranks.allocation import RankPlan
from makd.student.hub import describe_student
from makd.student.identity import file_names, identity_tensor, make_identity, saved_tensors
from makd.student.linear import LowRankLinear
from makd.weights.checkpoint import Checkpoint
from makd.weights.files import Source, write_tensors
from makd.weights.shards import INDEX
from makd.weights.sound import set_dtypes_

SHARD_SIZE = "50GB"
"""Of a weight file at most, as in `save_pretrained`."""


def write_student(
    checkpoint: Checkpoint,
    plan: RankPlan,
    work: WorkFolder,
    folder: Path,
    dtype: torch.dtype,
    on_shard: Callable[[int, int], None],
) -> None:
    """Write the student's shards and configs into `folder`; the checkpoint's model becomes the (empty) student.

    Args:
        checkpoint: of the teacher.
        plan: rank of every linear.
        work: has the factors.
        folder: exists, and is empty.
        dtype: of the weights in its files.
        on_shard: called with (how many are written, of how many).
    """
    model = checkpoint.model
    sources: dict[str, Source] = {}
    for name, rank in plan.ranks.items():
        if rank is not None:
            sources |= _replace_(checkpoint, name, rank, work)
    # the order in which a loaded model is saved, so that shards are the same
    tensors = dict(sorted(saved_tensors(model).items(), key=lambda item: dot_natural_key(item[0])))
    for name, tensor in tensors.items():
        if name not in sources:
            sources[name] = checkpoint.source(name) if name in checkpoint.tensors else Source.of(tensor)
    identity = make_identity((name, source.shape, next(iter(source.pieces()))) for name, source in sources.items())
    describe_student(model, identity)
    set_dtypes_(model, dtype)
    sources = {name: source.to(tensors[name].dtype) for name, source in sources.items() if name in tensors}
    names = {memory: file for file, memory in file_names(model).names.items()}
    tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    sources = {
        names.get(name, name): Source.of(identity_tensor(identity)) if name in names else source
        for name, source in sources.items()
    }
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=SHARD_SIZE)
    for done, (file, inside) in enumerate(split.filename_to_tensors.items(), start=1):
        write_tensors(folder / file, {name: sources[name] for name in inside})
        on_shard(done, len(split.filename_to_tensors))
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _replace_(checkpoint: Checkpoint, name: str, rank: int, work: WorkFolder) -> dict[str, Source]:
    """Put an empty factored linear in the place of `name`; gives what its tensors are."""
    linear = checkpoint.model.get_submodule(name)
    out_features, in_features = linear_shape(linear)
    has_bias = getattr(linear, "bias", None) is not None
    dtype = linear.get_parameter("weight").dtype
    factored = LowRankLinear(in_features, out_features, rank, has_bias, "meta", dtype)
    checkpoint.model.set_submodule(name, factored)
    matrix = work.read_matrix(name)
    sources = {f"{name}.reduce.weight": matrix.reduce(rank), f"{name}.expand.weight": matrix.expand(rank)}
    if has_bias:
        sources[f"{name}.expand.bias"] = checkpoint.source(f"{name}.bias")
    return sources
