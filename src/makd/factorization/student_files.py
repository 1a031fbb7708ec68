"""Station 3, from files to files: a student that is never in memory whole, in files as `save_pretrained` writes them.

While layers are fitted, one of them is in memory, in the place of an empty one; what it has learned goes to the store.
In the end the store's tensors and the teacher's are copied into the student's shards, piece by piece.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from makd.anatomy import Layer
from makd.calibration import entries
from makd.calibration.store import DiskStore
from makd.factorization.kept_layers import keep_layer
from makd.ranks.planning import RankAssignment
from makd.student.hub import describe_student
from makd.student.identity import file_names, identity_tensor, make_identity, saved_tensors
from makd.student.linear import LowRankLinear
from makd.student.placing import place_empty_
from makd.weights.files import Source, StoredTensor, write_tensors
from makd.weights.on_disk import Checkpoint
from makd.weights.shards import INDEX
from makd.weights.sound import set_dtypes_

SHARD_SIZE = "50GB"
"""Of a weight file at most, as in `save_pretrained`."""


class StudentFiles:
    """The student of a teacher in files: empty, but for the layer that is worked on."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, store: DiskStore, device: torch.device) -> None:
        """`model` is a copy of the checkpoint's empty one, and becomes the student."""
        self.checkpoint, self.model, self.store, self.device = checkpoint, model, store, device

    @contextmanager
    def layer(self, layer: Layer) -> Iterator[None]:
        """Inside the block the layer has the teacher's weights, to be replaced; what has replaced them is kept."""
        module = self.model.get_submodule(layer.module)
        names = [f"{layer.module}.{name}" for name, _ in module.named_parameters()]
        with self.checkpoint.filled(names, self.device, self.model):
            yield
            keep_layer(self.store, self.model, layer)
        for part in module.modules():
            for leaf, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))

    @contextmanager
    def frame(self) -> Iterator[None]:
        """What is in no layer is the teacher's."""
        with self.checkpoint.filled([], self.device, self.model):
            yield


def learned_sources(store: DiskStore, layers: int) -> dict[str, Source]:
    """Every tensor of layers that were worked on."""
    kept = [store.stored(entries.layer_parameters(layer)) for layer in range(layers)]
    return {name: Source.stored(stored) for tensors in kept for name, stored in tensors.items()}


def factor_sources(store: DiskStore, planned: RankAssignment, out_features: Mapping[str, int]) -> dict[str, Source]:
    """Factors of the planned ranks, of those that were kept at larger ones.

    Args:
        store: has them.
        planned: ranks, and which linears share one A.
        out_features: of every linear.
    """
    sources = {}
    for item, rank in planned.items.ranks.items():
        if rank is None:
            continue
        stored, first = store.stored(entries.factors(item)), 0
        linears = planned.linears_of(item)
        sources[f"{linears[0]}.reduce.weight"] = _corner(stored["reduce"], 0, rank)
        for linear in linears:
            stop = first + out_features[linear]
            sources[f"{linear}.expand.weight"] = _corner(stored["expand"], first, stop, rank)
            first = stop
    return sources


def _corner(stored: StoredTensor, first: int, stop: int, columns: int | None = None) -> Source:
    """Rows `first` to `stop` of a matrix in a file, and their first columns."""
    width = stored.shape[1] if columns is None else columns
    return Source(stored.dtype, (stop - first, width), lambda: (rows[:, :width] for rows in stored.pieces(first, stop)))


def write_student(
    checkpoint: Checkpoint,
    student: PreTrainedModel,
    planned: RankAssignment,
    made: Mapping[str, Source],
    folder: Path,
    dtype: torch.dtype,
    on_shard: Callable[[int, int], None],
) -> None:
    """Write the student's shards and configs into `folder`.

    Args:
        checkpoint: of the teacher.
        student: empty; gets the modules that it lacks.
        planned: rank of every linear, and which share one A.
        made: the student's own tensors; all others are the teacher's.
        folder: exists, and is empty.
        dtype: of the weights in its files.
        on_shard: called with (how many are written, of how many).
    """
    place_empty_(student, planned.plan.ranks, [group.linears for group in planned.groups])
    # the order in which a loaded model is saved, so that shards are the same
    tensors = dict(sorted(saved_tensors(student).items(), key=lambda item: dot_natural_key(item[0])))
    sources = {name: made[name] if name in made else _teachers(checkpoint, student, name, tensor)
               for name, tensor in tensors.items()}  # fmt: skip
    identity = make_identity((name, source.shape, next(iter(source.pieces()))) for name, source in sources.items())
    describe_student(student, identity)
    set_dtypes_(student, dtype)
    sources = {name: source.to(tensors[name].dtype) for name, source in sources.items()}
    names = {memory: file for file, memory in file_names(student).names.items()}
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
        metadata = {"total_parameters": student.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    student.config.dtype = str(student.dtype).removeprefix("torch.")
    student.config.architectures = [type(student).__name__]
    student.config.save_pretrained(folder)
    if student.can_generate():
        student.generation_config.save_pretrained(folder)


def _teachers(checkpoint: Checkpoint, student: PreTrainedModel, name: str, tensor: torch.Tensor) -> Source:
    """A tensor that the student has of its teacher; a factored linear's bias is its dense one's."""
    owner, _, leaf = name.rpartition(".")
    linear, _, part = owner.rpartition(".")
    if part == "expand" and leaf == "bias" and isinstance(student.get_submodule(linear), LowRankLinear):
        return checkpoint.source(f"{linear}.bias")
    return checkpoint.source(name) if name in checkpoint.tensors else Source.of(tensor)
