"""What a student's `config.json` says of it, and how it is read: by hand it can be changed into anything."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from makd.errors import ModelLoadError
from makd.registry import unknown_name

METHOD = "makd"
FORMAT = 4
"""Version of what is stored; a reader refuses a higher one.

1: factors; 2: factored embeddings, dropped layers; 3: linears that share an A; 4: identities, under names that
transformers without makd looks for, and all else under its names in memory.
"""
COUNTS = ("total", "factored", "vocabulary")


@register_quantization_config(METHOD)
class StudentConfig(QuantizationConfigMixin):
    """What a student's `config.json` says of it: which linears are factored at which rank, and its size.

    Args:
        ranks: name of a linear in the saved model -> its rank.
        parameters: counts that a load must find again: `factored` (all factors, with the biases of factored linears),
            `vocabulary` (token embeddings and LM head, which a user may resize) and `total`.
        architecture: class of the model that was counted.
        embeddings: name of factored token embeddings in the saved model -> their rank. An LM head that transformers
            ties to them has their factors, under any model class.
        shared: name of a linear in the saved model that holds the A of others too -> the names of those. Each has its
            rank in `ranks`.
        dropped: name of a layer that the student does without -> what it returned: 0 for its hidden states alone,
            else the length of a tuple.
        identity: sixteen hexadecimal digits, made from the student's weights when it was made. Each stand-in in the
            weight files has it too: weights and config of two students do not go together.
        format: version of this layout.
        quant_method: always "makd"; transformers finds the quantizer by it.

    Raises:
        ModelLoadError: something of it is not as described here, or the format is a newer one.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        parameters: Mapping[str, int],
        architecture: str,
        embeddings: Mapping[str, int] | None = None,
        dropped: Mapping[str, int] | None = None,
        shared: Mapping[str, Sequence[str]] | None = None,
        identity: str | None = None,
        format: int = FORMAT,
        quant_method: str = METHOD,
    ) -> None:
        _check("format", format, _is_size, "a number from 1 on")
        if format > FORMAT:
            raise ModelLoadError(
                f"This student was saved in makd's format {format}; this makd reads up to {FORMAT}. Update makd."
            )
        embeddings = {} if embeddings is None else embeddings
        dropped = {} if dropped is None else dropped
        shared = {} if shared is None else shared
        _check("ranks", ranks, _are_sizes, "names of linears with their ranks, from 1 on")
        _check("embeddings", embeddings, _are_sizes, "names of embeddings with their ranks, from 1 on")
        _check("dropped", dropped, _are_counts, "names of layers with what they returned, from 0 on")
        _check("shared", shared, _are_groups, "names of linears with lists of other linears")
        _check("parameters", parameters, _are_counts, f"{', '.join(COUNTS)} with numbers from 0 on")
        for count in COUNTS:
            if count not in parameters:
                raise ModelLoadError(f"quantization_config.parameters lacks {count!r}. {_WHAT_NEXT}")
        for name in (name for leader, others in shared.items() for name in (leader, *others)):
            if name not in ranks:
                raise ModelLoadError(f"quantization_config.shared names {name!r}, which has no rank. {_WHAT_NEXT}")
        _check("architecture", architecture, _is_name, "the name of a model's class")
        if format >= 4 or identity is not None:
            _check("identity", identity, _is_identity, "sixteen hexadecimal digits, the first below 8")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.ranks = dict(ranks)
        self.parameters = dict(parameters)
        self.architecture = architecture
        self.embeddings = dict(embeddings)
        self.dropped = dict(dropped)
        self.shared = {name: list(others) for name, others in shared.items()}
        self.identity = identity
        self.format = format

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What stands in `config.json`, checked. The signature is transformers'.

        Raises:
            ModelLoadError: a key is missing, or there is one too many, or a value is of another kind.
        """
        for key in config_dict:
            if key not in _KEYS:
                raise ModelLoadError(f"{unknown_name('key of quantization_config', str(key), _KEYS)} {_WHAT_NEXT}")
        for key in ("ranks", "parameters", "architecture", "format"):
            if key not in config_dict:
                raise ModelLoadError(f"The quantization_config in config.json lacks {key!r}. {_WHAT_NEXT}")
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


_KEYS = (
    "ranks", "parameters", "architecture", "embeddings", "dropped", "shared", "identity", "format", "quant_method"
)  # fmt: skip
_WHAT_NEXT = "It was changed after saving: copy the student's config.json again, as makd wrote it."


def _check(key: str, value: object, is_right: Callable[[Any], bool], allowed: str) -> None:
    if not is_right(value):
        raise ModelLoadError(f"quantization_config.{key} is {allowed}; config.json has {value!r:.80}. {_WHAT_NEXT}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: object) -> bool:
    return _is_count(value) and value != 0


def _are_counts(value: object) -> bool:
    return isinstance(value, Mapping) and all(_is_name(key) and _is_count(number) for key, number in value.items())


def _are_sizes(value: object) -> bool:
    return isinstance(value, Mapping) and all(_is_name(key) and _is_size(number) for key, number in value.items())


def _are_groups(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_name(leader) and isinstance(others, Sequence) and not isinstance(others, str) and all(map(_is_name, others))
        for leader, others in value.items()
    )


def _is_identity(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-7][0-9a-f]{15}", value) is not None
