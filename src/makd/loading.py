"""From a name to a model or tokenizer: hub ids, folders, GGUF files, and models that Python packages carry.

Stands at the mouth of the flow: everything after it holds a `PreTrainedModel` and does not ask where it came from.

    name -> where it lies (`locate`) -> in which files (`makd.weights.shards`) -> its class (`_model_class`), which
    loads it -> is it all from its files (`makd.checkpoint`), plain and finite (`makd.weights.sound`)?

A teacher that stays on disk is built empty (`load_empty_model`), and filled a layer at a time (`makd.weights.on_disk`).
"""

import copy
import importlib.util
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import makd.student.registration  # noqa: F401 - registers how a student is loaded
from makd.anatomy.eval_mode import in_eval
from makd.checkpoint import (
    check_complete,
    check_complete_below_head,
    check_numbers,
    check_padding,
    read_config,
    refusing,
    without_report,
)
from makd.errors import ModelLoadError, SettingError
from makd.kinds import shown
from makd.processes.started import loading_in_each_process
from makd.registry import Registry
from makd.sentence_encoder import as_in_folder, find_folder, is_sentence_encoder, transformer_path
from makd.source_names import name_of
from makd.student.stored import check_folder
from makd.weights.shards import weight_files
from makd.weights.sound import check_finite, check_plain, set_dtypes_

logger = logging.getLogger(__name__)

HEADS: Registry[str] = Registry(
    "head",
    {
        "base": "AutoModel",
        "masked_lm": "AutoModelForMaskedLM",
        "causal_lm": "AutoModelForCausalLM",
        "seq2seq_lm": "AutoModelForSeq2SeqLM",
        "sequence_classification": "AutoModelForSequenceClassification",
        "token_classification": "AutoModelForTokenClassification",
        "question_answering": "AutoModelForQuestionAnswering",
    },
)
"""Head name in recipes -> transformers' class; "auto" takes the class that the checkpoint names."""

PACKAGE_SCHEME = "package:"
LONGEST_NAME = 255
"""Bytes of a part of a path; beyond, file systems answer with an error instead of no."""


@dataclass(frozen=True)
class Location:
    """Where a checkpoint lies: a hub id or folder, and the GGUF file in it, if it is one."""

    folder: str
    gguf_file: str | None = None


def locate(name: str) -> Location:
    """Understand a checkpoint's name.

    `org/model` is a hub id; an existing path is a folder or a `.gguf` file; `package:module/path` is a folder or file
    inside an installed Python package.

    Raises:
        ModelLoadError: an empty name, a package that is not installed, or a path that does not exist.
    """
    if not name:
        raise ModelLoadError("The model's name is empty. Give a folder, a .gguf file, or a hub id such as org/model.")
    if any(len(part.encode()) > LONGEST_NAME for part in name.split("/")):
        raise ModelLoadError(f"A file's name has at most {LONGEST_NAME} bytes; got {shown(name)}.")
    if name.startswith(PACKAGE_SCHEME):
        name = str(_inside_package(name.removeprefix(PACKAGE_SCHEME)))
    path = Path(name).expanduser()
    if path.exists():  # a model remembers where it is from, also when the working directory is another
        path = path.absolute()
    if path.suffix == ".gguf" and path.is_file():
        return Location(str(path.parent), path.name)
    if path.is_dir():
        if (path / "modules.json").is_file():
            path = path / transformer_path(path)  # a subfolder, as sentence-transformers once had it
        return Location(str(path))
    if path.exists():
        raise ModelLoadError(f"{name} is a file; a model is a folder with config.json and weights, or a .gguf file.")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise ModelLoadError(f"{name} does not exist. Give a folder, a .gguf file, or a hub id such as org/model.")
    return Location(name)


def load_model(
    name: str,
    head: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model called `name`, in eval mode, with plain weights in `dtype` on `device`, all of them from its files.

    Raises:
        ModelLoadError: it does not exist, holds no weights or not all of them, is quantized, or its files do not fit
            together.
        NumericsError: a weight is NaN or infinite, in the files or in `dtype`.
        UnknownNameError: `head` is not in `HEADS` (nor "auto").
    """
    model, found = _load(name, head, dtype, {})
    check_complete(model, found, name)
    return _ready(model, name, device)


def load_learner(
    name: str,
    head: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **config: Any,
) -> PreTrainedModel:
    """A model that is to be taught what `head` is for: where the checkpoint has no such head, it gets a new one.

    What is in `config` replaces what its config says (`num_labels`, ...), as `from_pretrained` takes it.

    Raises:
        ModelLoadError: as `load_model`.
        NumericsError: as `load_model`.
        UnknownNameError: as `load_model`.
    """
    model, found = _load(name, head, dtype, config)
    check_complete_below_head(model, found, name)
    return _ready(model, name, device)


def _load(name: str, head: str, dtype: torch.dtype, config: Mapping[str, Any]) -> tuple[PreTrainedModel, Any]:
    """A model, and what transformers tells of how its weights and those of the files match."""
    where = locate(name)
    weight_files(Path(where.folder))
    check_folder(Path(where.folder))
    arguments: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True, **config}
    arguments["trust_remote_code"] = False  # else transformers asks at a terminal
    if where.gguf_file is not None:
        arguments["gguf_file"] = where.gguf_file
    cls = _model_class(where, head)
    with refusing(f"No model could be loaded from {name!r}"), without_report(), loading_in_each_process():
        model, found = cls.from_pretrained(where.folder, **arguments)
    if where.gguf_file is not None:
        _forget_gguf(model)
    else:
        check_numbers(Path(where.folder), model, name)
    return model, found


def _ready(model: PreTrainedModel, name: str, device: torch.device | str) -> PreTrainedModel:
    check_plain(model)
    check_finite(model, name)
    nn.Module.to(model, device)
    model.eval()
    return model


def load_empty_model(name: str, head: str = "auto", dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Path]:
    """The model called `name` with parameters on the `meta` device, in eval mode, and the folder of its files.

    Buffers that are computed (rotary frequencies) are real. What has to stay in float32 has that dtype.

    Raises:
        ModelLoadError: it does not exist, is a GGUF, is quantized, or is a student.
        UnknownNameError: `head` is not in `HEADS` (nor "auto").
    """
    where = locate(name)
    if where.gguf_file is not None:
        raise ModelLoadError(
            f"{name} is a GGUF file, whose weights transformers expands all at once; only safetensors can be streamed."
        )
    cls = _model_class(where, head)
    with refusing(f"No model could be built from {name!r}"):
        folder = _local_folder(where.folder)
        config = read_config(str(folder))
        if getattr(config, "quantization_config", None) is not None:
            raise ModelLoadError(
                f"{name} holds quantized or factored weights; makd factorizes plain ones. Load the model that it was "
                "made from instead."
            )
        build = getattr(cls, "_from_config", None) or cls.from_config
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = build(config, dtype=dtype)
    model.tie_weights()  # each got an empty tensor of its own
    set_dtypes_(model, dtype)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), folder


def _local_folder(name: str) -> Path:
    """The folder `name`, or where the hub's files were put on this machine."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model called `name`; one without a padding token pads with its end-of-text token.

    Raises:
        ModelLoadError: there is none, or it has neither a padding nor an end-of-text token.
    """
    where = locate(name)
    if not may_have_tokenizer(name):
        raise ModelLoadError(
            f"{name} holds no tokenizer (no tokenizer.json, tokenizer_config.json or vocabulary). Copy the "
            "teacher's tokenizer files into it, or name another one with `tokenizer`."
        )
    arguments = {"gguf_file": where.gguf_file} if where.gguf_file else {}
    with refusing(f"No tokenizer could be loaded from {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(where.folder, trust_remote_code=False, **arguments)
    return as_in_folder(with_padding(tokenizer, name), where.folder)


def with_padding(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """A `tokenizer` that pads: a copy that does with its end-of-text token, where it has no padding token.

    Args:
        tokenizer: it is not changed.
        name: of its model, for the error.

    Raises:
        ModelLoadError: it has no end-of-text token either.
    """
    if tokenizer.pad_token is not None:
        return tokenizer
    if tokenizer.eos_token is None:
        raise ModelLoadError(f"The tokenizer of {name} has neither a padding nor an end-of-text token; set one.")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def may_have_tokenizer(name: str) -> bool:
    """Whether there may be a tokenizer beside the model called `name`: not in a folder here that has no file of one."""
    where = locate(name)
    folder = Path(where.folder)
    if where.gguf_file or not folder.is_dir():
        return True
    vocabularies = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
    return any("token" in path.name or path.name in vocabularies for path in folder.iterdir())


def _inside_package(name: str) -> Path:
    package, _, rest = name.partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of a package inside one that is not there; of an empty name
        spec = None
    if spec is None or spec.origin is None:
        raise ModelLoadError(
            f"{PACKAGE_SCHEME}{name}: the Python package {package!r} is not installed. "
            f"`pip install {package.replace('_', '-')}` brings it."
        )
    path = Path(spec.origin).parent / rest
    if not path.exists():
        raise ModelLoadError(f"{PACKAGE_SCHEME}{name}: the package {package!r} has no {rest!r} in it.")
    return path


def load_config(name: str) -> PretrainedConfig:
    """The config of the checkpoint called `name`, which is no GGUF.

    Raises:
        ModelLoadError: there is none, or it is not one.
    """
    config = read_config(locate(name).folder)
    check_padding(config, name)
    return config


def _model_class(where: Location, head: str) -> Any:
    """The class to load with: the checkpoint's own, or that of a head.

    Raises:
        ModelLoadError: the config is none, or names classes that transformers does not know.
        UnknownNameError: `head` is not in `HEADS`.
    """
    if where.gguf_file is not None:
        return transformers.AutoModelForCausalLM if head == "auto" else getattr(transformers, HEADS[head])
    if head != "auto":
        HEADS[head]
    config = load_config(where.folder)
    if head != "auto":
        return getattr(transformers, HEADS[head])
    if not config.architectures:
        logger.warning(
            "The config.json of %s does not say which head the checkpoint has (`architectures`): it is loaded without "
            "one. Name it with recipe.head if it has one.",
            where.folder,
        )
        return AutoModel
    folder = find_folder(where.folder)
    is_encoder = folder is not None and is_sentence_encoder(folder)  # of which sentence-transformers takes no head
    names = [name for name in config.architectures if name.endswith("Model") or not is_encoder]
    if not names:
        return AutoModel
    for name in names:
        cls = getattr(transformers, name, None) or _registered(name, config)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    raise ModelLoadError(
        f"{where.folder} is a {', '.join(config.architectures)}, which transformers {transformers.__version__} does "
        f"not know. Choose a head that it has, with recipe.head: {', '.join(HEADS)}."
    )


def _registered(name: str, config: PretrainedConfig) -> Any:
    """The class called `name` that a user's package told transformers of, for such a config; None if there is none."""
    listed = (getattr(transformers, head)._model_mapping for head in HEADS.values())
    classes = (mapping[type(config)] for mapping in listed if type(config) in mapping)
    return next((cls for cls in classes if getattr(cls, "__name__", None) == name), None)


def _forget_gguf(model: PreTrainedModel) -> None:
    """A GGUF's weights were expanded while loading: the model is an ordinary one and shall be saved as such."""
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(attribute, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def take_model(model: str | PreTrainedModel, head: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model, loaded if it is a name (see `load_model`); one in hand keeps its head and dtype. In eval mode.

    Raises:
        ModelLoadError: see `load_model`; or the one in hand is quantized, offloaded or spread over devices.
        NumericsError: a weight is NaN or infinite.
    """
    if isinstance(model, str):
        return load_model(model, head, dtype, device)
    return _ready(model, name_of(model), device)


def modes_kept(*models: str | PreTrainedModel) -> AbstractContextManager[None]:
    """Around work on `models`: those in hand are in eval mode inside, and afterwards in the modes that they had."""
    return in_eval(*(model for model in models if isinstance(model, PreTrainedModel)))


def folder_or_name(model: str) -> str:
    """Where `model` is; itself, if it names no place, as the class of one in hand."""
    try:
        return locate(model).folder
    except ModelLoadError:
        return model


def check_dtype(name: str) -> torch.dtype:
    """Refuse a `name` of no dtype; gives the torch dtype that is called so.

    Raises:
        SettingError: it is none of float32, bfloat16, float16.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise SettingError(f"dtype is one of {', '.join(known)}; got {name!r}.")
    return known[name]
