"""From a name to a model or tokenizer: hub ids, folders, GGUF files, and models that Python packages carry.

Stands at the mouth of the flow: everything after it holds a `PreTrainedModel` and does not ask where it came from.
"""

import importlib.util
import logging
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import makd.lowrank.hub  # noqa: F401 - registers how a student is loaded
from makd.errors import ModelLoadError, SettingError
from makd.kinds import shown
from makd.registry import Registry

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
    if path.suffix == ".gguf" and path.is_file():
        return Location(str(path.parent), path.name)
    if path.is_dir():
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
    **config: Any,
) -> PreTrainedModel:
    """The model called `name`, in eval mode, with plain weights in `dtype` on `device`.

    What is in `config` replaces what its config says (`num_labels`, ...), as `from_pretrained` takes it.

    Raises:
        ModelLoadError: it does not exist, holds no weights, is quantized, or its files do not fit together.
        UnknownNameError: `head` is not in `HEADS` (nor "auto").
    """
    where = locate(name)
    arguments: dict[str, Any] = {"dtype": dtype, **config}
    if where.gguf_file is not None:
        arguments["gguf_file"] = where.gguf_file
    try:
        model = _model_class(where, head).from_pretrained(where.folder, **arguments)
    except ModelLoadError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelLoadError(f"No model could be loaded from {name!r}: {_first_lines(error)}") from error
    if where.gguf_file is not None:
        _forget_gguf(model)
    elif getattr(model, "is_quantized", False):
        raise ModelLoadError(
            f"{name} holds quantized weights; makd factorizes plain ones. Load its unquantized version instead."
        )
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


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
    try:
        folder = _local_folder(where.folder)
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelLoadError(
                f"{name} holds quantized or factored weights; makd factorizes plain ones. Load the model that it was "
                "made from instead."
            )
        cls = _model_class(Location(str(folder)), head)
        build = getattr(cls, "_from_config", None) or cls.from_config
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = build(config, dtype=dtype)
    except ModelLoadError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelLoadError(f"No model could be built from {name!r}: {_first_lines(error)}") from error
    model.tie_weights()  # each got an empty tensor of its own
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for parameter_name, parameter in model.named_parameters():
            if re.search(rf"(^|\.){pattern}(\.|$)", parameter_name):
                parameter.data = parameter.data.to(kept)
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
    files = () if not Path(where.folder).is_dir() or where.gguf_file else tuple(Path(where.folder).glob("*token*"))
    vocabularies = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
    if Path(where.folder).is_dir() and not where.gguf_file and not files:
        files = tuple(path for path in Path(where.folder).iterdir() if path.name in vocabularies)
        if not files:
            raise ModelLoadError(
                f"{name} holds no tokenizer (no tokenizer.json, tokenizer_config.json or vocabulary). Copy the "
                "teacher's tokenizer files into it, or name another one with `tokenizer`."
            )
    arguments = {"gguf_file": where.gguf_file} if where.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where.folder, **arguments)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise ModelLoadError(f"No tokenizer could be loaded from {name!r}: {_first_lines(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelLoadError(f"The tokenizer of {name} has neither a padding nor an end-of-text token; set one.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def _model_class(where: Location, head: str) -> Any:
    if head != "auto":
        return getattr(transformers, HEADS[head])
    if where.gguf_file is not None:
        return transformers.AutoModelForCausalLM
    config = AutoConfig.from_pretrained(where.folder)
    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    return getattr(transformers, names[0]) if names else AutoModel


def _forget_gguf(model: PreTrainedModel) -> None:
    """A GGUF's weights were expanded while loading: the model is an ordinary one and shall be saved as such."""
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(attribute, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _first_lines(error: BaseException) -> str:
    """The part of a library's error text that a person needs."""
    return " ".join(str(error).split("\n\n")[0].split())[:400]


def take_model(model: str | PreTrainedModel, head: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model, loaded if it is a name (see `load_model`); one in hand keeps its head and dtype. In eval mode."""
    if isinstance(model, str):
        return load_model(model, head, dtype, device)
    nn.Module.to(model, device)
    model.eval()
    return model


def take_tokenizer(tokenizer: str | PreTrainedTokenizerBase | None, model: str) -> PreTrainedTokenizerBase:
    """The tokenizer, loaded if it is a name (see `load_tokenizer`), or that of `model` if it is None."""
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else load_tokenizer(tokenizer or model)


def check_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`.

    Raises:
        SettingError: it is none of float32, bfloat16, float16.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise SettingError(f"dtype is one of {', '.join(known)}; got {name!r}.")
    return known[name]
