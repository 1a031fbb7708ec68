"""What is checked of a student's files before and after transformers reads them.

transformers fills what it does not find at random and goes on; here that is an error.
"""

import copy
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from makd.anatomy import StandIn
from makd.anatomy.stand_in import NUMBER
from makd.errors import ModelLoadError
from makd.student.adaptive_embedding import AdaptiveEmbedding
from makd.student.config import METHOD, StudentConfig
from makd.student.embedding import is_tied_head
from makd.student.identity import Shapes, names_in_memory
from makd.student.placing import place_stand_ins_
from makd.weights.shards import weight_files

ORDER = ".order"
"""How the name of the order of tokens ends in a file."""
FACTORS = (".reduce.weight", ".expand.weight", ".expand.bias", ".table.weight", ".directions.weight")
"""How the names of factors end in a file."""


def check_folder(folder: Path) -> None:
    """Refuse a `folder` whose config and weights do not agree on being a student's, or on not being one.

    Raises:
        ModelLoadError: the weights are a student's, and config.json does not say so, or cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # transformers says what is wrong with it
        return
    method = config.get("quantization_config") if isinstance(config, dict) else None
    if method is not None and not isinstance(method, dict):
        raise ModelLoadError(
            f"{folder / 'config.json'}: quantization_config is a mapping; it is {method!r:.80}. Copy the file again."
        )
    if (method or {}).get("quant_method") == METHOD:
        return  # what the files must hold is checked when they are read
    try:
        shapes = read_shapes([str(path) for path in weight_files(folder) if path.suffix == ".safetensors"])
    except ModelLoadError:  # perhaps of a plain model: transformers says what is wrong with it
        return
    for name, shape in shapes.items():
        if shape == NUMBER or name.endswith((".reduce.weight", ".directions.weight")):
            raise ModelLoadError(
                f"{folder} holds the weights of a makd student, but its config.json has no quantization_config of "
                "makd's: it is another model's, or was changed after saving. Copy the student's folder again, whole."
            )


def read_shapes(files: Sequence[str]) -> Shapes:
    """Name -> shape of all tensors in the files; no weights are read.

    Raises:
        ModelLoadError: a file is not whole, or no safetensors file.
    """
    shapes = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise ModelLoadError(f"{file}: a student is stored as safetensors, and only so.")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ModelLoadError(f"{file} is not whole ({error}). Copy the student's folder again.") from error
    return shapes


def check_factors(shapes: Shapes, model: PreTrainedModel, config: StudentConfig) -> None:
    """Refuse files with more or fewer factored parameters than the config says.

    What the saved model ties counts once, also where each name has a tensor of its own, as consolidated ones have.

    Args:
        shapes: what the files hold.
        model: empty, with its stand-ins, perhaps under another head than the one that was saved.
        config: of the student.

    Raises:
        ModelLoadError: the counts differ.
    """
    counted = {name: math.prod(shape) for name, shape in shapes.items() if name.endswith(FACTORS)}
    found = sum(counted.values())
    if found > config.parameters["factored"]:
        ties = (_as_saved(model, config) or model).all_tied_weights_keys or {}
        found -= sum(count for name, count in counted.items() if ties.get(name) in counted)
    if found != config.parameters["factored"]:
        raise ModelLoadError(
            f"The weight files hold {found:,} parameters of factored linears; config.json says "
            f"{config.parameters['factored']:,}. The weights are not this student's: copy its folder again, whole."
        )


def check_tensors(shapes: Shapes, model: PreTrainedModel, config: StudentConfig) -> None:
    """Refuse files that lack a tensor of the model that was saved.

    Args:
        shapes: what the files hold; only the names are looked at.
        model: empty, with its stand-ins, perhaps under another head than the one that was saved.
        config: of the student.

    Raises:
        ModelLoadError: a tensor is missing.
    """
    whole = _as_saved(model, config)
    if whole is None:
        return
    found = set(names_in_memory(shapes, whole))
    missing = sorted(name for name in whole.state_dict() if name not in found and not _may_lack(whole, name, found))
    if missing:
        raise ModelLoadError(
            f"The weight files lack {missing[0]!r} and {len(missing) - 1} other tensors of this "
            f"{type(whole).__name__}; transformers would fill them at random. They are not whole, or were renamed: "
            "copy the student's folder again."
        )


def _as_saved(model: PreTrainedModel, config: StudentConfig) -> PreTrainedModel | None:
    """`model` under the head that was saved; None where that is remote code, which is not run to find out."""
    named = model.config.architectures
    saved = str(named[0]) if isinstance(named, list) and named else config.architecture
    if type(model).__name__ == saved:
        return model
    if getattr(model.config, "auto_map", None):
        return None
    whole = _class_of(model, saved)(copy.deepcopy(model.config))
    place_stand_ins_(whole, config)
    return whole


def _class_of(model: PreTrainedModel, name: str) -> type[PreTrainedModel]:
    """The class called `name`, of another head for the same kind of model."""
    cls = getattr(transformers, name, None)
    if (
        not isinstance(cls, type)
        or not issubclass(cls, PreTrainedModel)
        or not (isinstance(model.config, cls.config_class or ()) or name in _classes_of(model.config.model_type))
    ):
        raise ModelLoadError(
            f"config.json says that this student is a {name}, which transformers has not for model type "
            f"{model.config.model_type!r}. It was changed after saving: copy the student's folder again, whole."
        )
    return cls


def _classes_of(model_type: str) -> frozenset[str]:
    """Names of the classes that transformers builds for a model type: of some, another type's (EXAONE's: Llama's)."""
    mappings = (value for name, value in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES"))
    entries = (mapping.get(model_type, ()) for mapping in mappings)
    return frozenset(name for entry in entries for name in ([entry] if isinstance(entry, str) else entry))


def check_shapes(shapes: Shapes, model: PreTrainedModel) -> None:
    """Refuse factors in files that have other shapes than in `model`, which is empty.

    Raises:
        ModelLoadError: a factor has another shape.
    """
    state = model.state_dict()
    for name, shape in names_in_memory(shapes, model).items():
        if name.endswith((*FACTORS, ORDER)) and name in state and tuple(state[name].shape) != shape:
            raise ModelLoadError(
                f"{name} has shape {shape} in the weight files; config.json makes it {tuple(state[name].shape)}. "
                "Weights and config are of different students: copy the student's folder again, whole."
            )


def check_orders(model: PreTrainedModel) -> None:
    """Refuse embeddings in bands of which some tokens have no row, or two have one.

    Raises:
        ModelLoadError: the order of tokens is none.
    """
    for name, module in model.named_modules():
        if not isinstance(module, AdaptiveEmbedding) or module.order.is_meta:
            continue
        rows = module.order.sort().values
        if not torch.equal(rows, torch.arange(module.num_embeddings, dtype=rows.dtype, device=rows.device)):
            raise ModelLoadError(
                f"{name}.order does not give each of {module.num_embeddings:,} tokens a row of its own. The weight "
                "files were changed after saving: copy the student's folder again, whole."
            )


def _may_lack(model: PreTrainedModel, name: str, found: set[str]) -> bool:
    """Whether a tensor need not be in the files: it is tied to one that is, or the model itself can do without."""
    ties = model.all_tied_weights_keys or {}
    if ties.get(name) in found or any(source == name and target in found for target, source in ties.items()):
        return True
    patterns = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    return any(re.search(pattern, name) for pattern in patterns)


def check_identity(model: PreTrainedModel, config: StudentConfig) -> None:
    """Refuse weights that are not those that the config was written with.

    Raises:
        ModelLoadError: they are of another student.
    """
    wanted = int(config.identity or "0", 16)
    for name, module in model.named_modules():
        if not isinstance(module, StandIn) or is_tied_head(model, module):  # a new head's factors are the embeddings'
            continue
        if module.identity.device.type != "meta" and int(module.identity) != wanted:
            raise ModelLoadError(
                f"The weights of {name!r} are of student {int(module.identity):016x}; config.json is of "
                f"{config.identity}. Weights and config are of different students: copy the student's folder again, "
                "whole."
            )
