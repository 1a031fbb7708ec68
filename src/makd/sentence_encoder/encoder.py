"""What sentence-transformers does with a model: which text it reads, and how an embedding comes of its hidden states.

A student is taught and measured as its users will call it, so all of this is taken from the teacher's folder.
"""

import logging
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from makd.errors import SettingError
from makd.sentence_encoder.after_pooling import AfterPooling, read_after_pooling
from makd.sentence_encoder.layout import (
    KNOWN,
    SETTINGS,
    TRANSFORMER_SETTINGS,
    Origin,
    find_folder,
    is_gone,
    is_sentence_encoder,
    read_described,
    read_modules,
    transformer_path,
)
from makd.sentence_encoder.pooling import AUTO, pool

logger = logging.getLogger(__name__)

_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
"""Flags of older folders, in the order in which the vectors follow each other -> pooling."""
_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
"""sentence-transformers' names -> makd's."""
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
"""What `similarity_fn_name` may be; the last two are distances, the nearer the more alike."""
_AS_USUAL = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
_NOT_CARRIED_OUT = ("config_args", "config_kwargs", "tokenizer_args", "processor_kwargs", "processing_kwargs",
                    "query_expansion")  # fmt: skip
_PLAIN = "Remove modules.json to treat the model as a plain transformer."


@dataclass(frozen=True)
class SentenceEncoder:
    """How a text's embedding is made of hidden states."""

    pooling: str = "mean"
    after: AfterPooling = field(default_factory=AfterPooling, compare=False)
    similarity: str = "cosine"
    """How users compare two embeddings: one of `SIMILARITIES`."""

    def __call__(
        self, hidden: Float[Tensor, "batch tokens hidden"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch embedding"]:
        """The embeddings of a batch's texts."""
        return self.after(pool(hidden, mask, self.pooling))

    def embeds_as(self, other: "SentenceEncoder") -> bool:
        """Whether both make the same embeddings of the same hidden states."""
        if (self.pooling, self.after.width) != (other.pooling, other.after.width):
            return False
        vectors = torch.linspace(-1, 1, self.after.width or 8)[None]
        return torch.equal(self.after(vectors), other.after(vectors))


@dataclass(frozen=True)
class TextSettings:
    """What sentence-transformers does to a text before the model reads it."""

    max_seq_length: int | None = None
    """Tokens of a text, at most; None leaves it to the tokenizer."""
    do_lower_case: bool = False
    prompt: str = ""
    """What stands before every text."""


def read_text_settings(folder: Path) -> TextSettings:
    """What the files of a sentence-transformers folder say about its texts.

    Raises:
        SettingError: a setting has a value that it cannot have.
        ModelLoadError: a file is damaged.
    """
    own = _transformer_settings(folder)
    length, lower = own.get("max_seq_length"), own.get("do_lower_case", False)
    if not (length is None or (isinstance(length, int) and not isinstance(length, bool) and length > 0)):
        raise SettingError(f"max_seq_length of {folder} is a number of tokens, at least 1, or null; got {length!r}.")
    if not isinstance(lower, bool):
        raise SettingError(f"do_lower_case of {folder} is true or false; got {lower!r}.")
    common = read_described(folder / SETTINGS, dict) if (folder / SETTINGS).is_file() else {}
    prompts, name = common.get("prompts") or {}, common.get("default_prompt_name")
    named = [text for key, text in prompts.items() if key == name] if isinstance(prompts, dict) else []
    if name is not None and not (named and isinstance(named[0], str)):
        raise SettingError(f"{folder / SETTINGS} has the default prompt {name!r}, which is not among its prompts.")
    return TextSettings(length, lower, "" if name is None else named[0])


def read_sentence_encoder(folder: Path) -> SentenceEncoder:
    """The pooling of a sentence-transformers folder, and what follows it.

    Raises:
        SettingError: it has a module, or a setting of one, that makd cannot carry out.
        ModelLoadError: a file is missing or damaged.
    """
    modules = read_modules(folder)
    _check_modules(folder)
    places = [index for index, module in enumerate(modules) if module.kind == "Pooling"]
    settings = read_described(folder / modules[1].path / "config.json", dict)
    after, similarity = read_after_pooling(folder, modules[places[0] + 1 :]), _similarity(folder)
    kinds = [module.kind for module in modules if module.kind != "Dropout"]
    if kinds[-1] == "Normalize" and similarity == "manhattan":
        after = AfterPooling((*after.steps, lambda vectors: normalize(vectors, dim=-1)), after.width)
    elif kinds[-1] == "Normalize":  # of vectors of length 1 products are cosines, and distances have their order
        similarity = "cosine"
    return SentenceEncoder(_pooling(folder, settings), after, similarity)


def _similarity(folder: Path) -> str:
    common = read_described(folder / SETTINGS, dict) if (folder / SETTINGS).is_file() else {}
    name = common.get("similarity_fn_name") or "cosine"
    if name not in SIMILARITIES:
        raise SettingError(
            f"{folder / SETTINGS} has similarity_fn_name {name!r}; makd knows {', '.join(SIMILARITIES)}. Set one."
        )
    return str(name)


def encoder_of(origin: Origin, pooling: str = AUTO) -> SentenceEncoder:
    """How the embeddings of the model from `origin` are made.

    Args:
        origin: of the teacher.
        pooling: `AUTO` takes what its sentence-transformers folder says, and `mean` where there is none. Another one
            than the folder's is taken, and said; the modules that follow the folder's pooling are then left out.

    Raises:
        SettingError: the folder asks for what makd cannot carry out.
        ModelLoadError: a file of the folder is missing or damaged.
    """
    folder = find_folder(origin.name)
    if folder is None:
        if pooling == AUTO and is_gone(origin.name):
            _warn_once(
                f"{origin.name}, where a model was loaded from, is no longer there, so nothing says how its texts are "
                "pooled: the mean is taken. Load it from where it is now, or name the pooling."
            )
        return SentenceEncoder("mean" if pooling == AUTO else pooling)
    if pooling != AUTO and not is_sentence_encoder(folder):
        return SentenceEncoder(pooling)
    own = read_sentence_encoder(folder)
    if pooling not in (AUTO, own.pooling):
        _warn_once(
            f"The pooling is {pooling}, as the settings say, but {folder} says {own.pooling}, which is what its users "
            f"get. Leave it at {AUTO} to take the folder's."
        )
        return SentenceEncoder(pooling, similarity=own.similarity)
    if origin.is_encoder_decoder:
        raise SettingError(
            f"{folder} is a sentence encoder of an encoder-decoder, of which sentence-transformers runs the encoder "
            f"alone. Save that (T5EncoderModel, …) and give it as the teacher. {_PLAIN}"
        )
    pooled = None if origin.width is None else origin.width * len(own.pooling.split("+"))
    if own.after.width is not None and pooled is not None and own.after.width != pooled:
        raise SettingError(
            f"{folder} pools to {pooled} channels, but the module that follows takes {own.after.width}. Its files do "
            "not belong together."
        )
    return own


def _check_modules(folder: Path) -> None:
    modules = read_modules(folder)
    kinds = [module.kind for module in modules]
    unknown = next((module.type for module in modules if not module.is_known), None)
    if unknown is not None:
        raise SettingError(
            f"{folder} has the module {unknown}, which makd cannot carry out; it knows sentence-transformers' "
            f"{', '.join(KNOWN)}. {_PLAIN}"
        )
    if kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Pooling") > 1 or kinds.count("Transformer") > 1:
        raise SettingError(
            f"{folder} has the modules {', '.join(kinds) or 'none'}; makd knows a Transformer, then one Pooling, then "
            f"others. {_PLAIN}"
        )
    own = _transformer_settings(folder)
    for name, usual in _AS_USUAL.items():
        if own.get(name, usual) != usual:
            raise SettingError(f"{folder} has {name} {own[name]!r}; makd knows {usual!r} alone. {_PLAIN}")
    modes = own.get("modality_config") or {}
    usual_text = {"method": "forward", "method_output_name": "last_hidden_state"}
    text = modes.get("text", usual_text) if isinstance(modes, dict) else modes
    if text != usual_text:
        raise SettingError(f"{folder} takes {text} of the model for a text; makd knows its last hidden state. {_PLAIN}")
    for name in _NOT_CARRIED_OUT:
        if own.get(name):
            raise SettingError(f"{folder} has {name} {own[name]!r}, which makd cannot carry out. {_PLAIN}")


def _pooling(folder: Path, settings: dict[str, Any]) -> str:
    if "pooling_mode" in settings:
        said = settings["pooling_mode"]
        modes = [said] if isinstance(said, str) else said
    else:
        modes = [_FLAGS[name] for name in _FLAGS if settings.get(name)] or ["mean"]
        modes = [next(key for key, value in _MODES.items() if value == mode) for mode in modes]
    if not isinstance(modes, list) or not modes or any(mode not in list(_MODES) for mode in modes):
        raise SettingError(
            f"{folder} has the pooling {settings['pooling_mode']!r}; makd knows {', '.join(_MODES)}. {_PLAIN}"
        )
    if settings.get("include_prompt") is False and read_text_settings(folder).prompt:
        raise SettingError(
            f"{folder} has a default prompt and leaves its tokens out of the pooling (include_prompt), which makd "
            f"cannot carry out. Set default_prompt_name to null in {SETTINGS}."
        )
    return "+".join(_MODES[mode] for mode in modes)


def _transformer_settings(folder: Path) -> dict[str, Any]:
    for name in TRANSFORMER_SETTINGS:
        path = folder / transformer_path(folder) / name
        if path.is_file():
            content: dict[str, Any] = read_described(path, dict)
            return content
    return {}


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)
