"""What a student's `config.json` says of it, and how it is read: by hand it can be changed into anything."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoQuantizationConfig,
    register_quantization_config,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from makd.errors import ModelLoadError
from makd.registry import unknown_name

METHOD = "makd"
FORMAT = 7
"""Version of what is stored; a reader refuses a higher one.

1: factors; 2: factored embeddings, dropped layers; 3: linears that share an A; 4: identities, under names that
transformers without makd looks for, and all else under its names in memory; 5: experts; 6: quantized factors; 7:
embeddings in bands. What has none of the last three is of format 4, and so on, which makd before them reads.
"""
BEFORE_EXPERTS = 4
BEFORE_QUANTIZED = 5
BEFORE_BANDS = 6
COUNTS = ("total", "factored", "vocabulary")

Bands = Mapping[str, Sequence[int | None]]
"""`rows` and `ranks` of each band of embeddings, as `AdaptiveEmbedding` takes them."""


class StudentConfig(QuantizationConfigMixin):
    """What a student's `config.json` says of it: which linears are factored at which rank, and its size.

    Args:
        ranks: name of a linear in the saved model -> its rank.
        parameters: counts that a load must find again: `factored` (all factors, with the biases of factored linears),
            `vocabulary` (token embeddings and LM head, which a user may resize) and `total`.
        architecture: class of the model that was counted.
        embeddings: name of factored token embeddings in the saved model -> their rank, or their bands' `rows` and
            `ranks`. An LM head that transformers ties to embeddings of one rank has their factors, under any model
            class; to bands none can be tied.
        shared: name of a linear in the saved model that holds the A of others too -> the names of those. Each has its
            rank in `ranks`.
        dropped: name of a layer that the student does without -> what it returned: 0 for its hidden states alone,
            else the length of a tuple.
        experts: name of a stack of experts' matrices in the saved model -> its `rank`, and which factor is `shared` by
            all experts: `reduce`, `expand` or "".
        identity: sixteen hexadecimal digits, made from the student's weights when it was made. Each stand-in in the
            weight files has it too: weights and config of two students do not go together.
        quantization: how another method quantized what the files hold; None where they hold plain numbers.
        format: version of this layout.
        quant_method: always "makd"; transformers finds the quantizer by it.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        parameters: Mapping[str, int],
        architecture: str,
        embeddings: Mapping[str, int | Bands] | None = None,
        dropped: Mapping[str, int] | None = None,
        shared: Mapping[str, Sequence[str]] | None = None,
        experts: Mapping[str, Mapping[str, int | str]] | None = None,
        identity: str | None = None,
        quantization: QuantizationConfigMixin | None = None,
        format: int | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.ranks = dict(ranks)
        self.parameters = dict(parameters)
        self.architecture = architecture
        self.embeddings = dict(embeddings or {})
        self.dropped = dict(dropped or {})
        self.shared = {name: list(others) for name, others in (shared or {}).items()}
        self.experts = {name: dict(entry) for name, entry in (experts or {}).items()}
        self.identity = identity
        self.quantization = quantization
        self.asked: QuantizationConfigMixin | None = None
        """How plain numbers are to be quantized while they are loaded; it does not stand in `config.json`."""
        self.format = self._lowest_format() if format is None else format

    def _lowest_format(self) -> int:
        if not _are_sizes(self.embeddings):
            return FORMAT
        if self.quantization is not None:
            return BEFORE_BANDS
        return BEFORE_QUANTIZED if self.experts else BEFORE_EXPERTS

    def to_dict(self) -> dict[str, Any]:
        """What stands in `config.json`."""
        values: dict[str, Any] = super().to_dict()
        del values["asked"]
        if not self.experts:
            del values["experts"]
        if self.quantization is None:
            del values["quantization"]
        else:
            values["quantization"] = self.quantization.to_dict()
        return values

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What stands in `config.json`, checked. The signature is transformers'.

        Raises:
            ModelLoadError: something of it is not as described here, or the format is a newer one.
        """
        _check_keys(config_dict)
        for key, (is_right, allowed) in _VALUES.items():
            if key in config_dict and not is_right(config_dict[key]):
                raise ModelLoadError(
                    f"quantization_config.{key} is {allowed}; config.json has {config_dict[key]!r:.80}. {_WHAT_NEXT}"
                )
        _check_names(config_dict)
        config = cls(**{**config_dict, "quantization": _read_quantization(config_dict.get("quantization"))})
        return (config, kwargs) if return_unused_kwargs else config

    def get(self, key: str, default: Any = None) -> Any:
        """An entry of `config.json`: transformers takes the config of a loaded model for a mapping."""
        return self.to_dict().get(key, default)

    def to_be_quantized(self, method: QuantizationConfigMixin) -> "StudentConfig":
        """This config for a student whose factors are quantized while they are loaded.

        Raises:
            ModelLoadError: the files are quantized in another way.
        """
        if self.quantization is not None:
            if self.quantization.to_dict() == method.to_dict():
                return self
            raise ModelLoadError(
                f"The files of this student are quantized already, with {self.quantization.to_dict()}; it cannot be "
                f"loaded with {method.to_dict()}. Leave out `quantization_config`, or load the student that it was "
                "made from."
            )
        asked = copy(self)
        asked.asked = method
        return asked


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # else makd_autoload was first, whose entry leads here
    register_quantization_config(METHOD)(StudentConfig)

_WHAT_NEXT = "It was changed after saving: copy the student's config.json again, as makd wrote it."


def _read_quantization(values: dict[str, Any] | None) -> QuantizationConfigMixin | None:
    """The config of the method that quantized the factors."""
    if values is None:
        return None
    try:
        config: QuantizationConfigMixin = AutoQuantizationConfig.from_dict(values)
    except Exception as error:  # a config with wrong values fails anywhere, with any type; its library may be missing
        raise ModelLoadError(
            f"This student's factors are quantized, and how cannot be read: quantization_config.quantization in "
            f"config.json is {values!r:.120} ({type(error).__name__}: {error}). Install the library that it names, in "
            "the version it was saved with; or copy the student's config.json again."
        ) from error
    return config


def _check_keys(values: Mapping[str, Any]) -> None:
    found = values.get("format", 0)
    if _is_size(found) and found > FORMAT:  # it may have keys that are not known here
        raise ModelLoadError(
            f"This student was saved in makd's format {found}; this makd reads up to {FORMAT}. Update makd."
        )
    for key in values:
        if key not in _VALUES:
            raise ModelLoadError(f"{unknown_name('key of quantization_config', key, _VALUES)} {_WHAT_NEXT}")
    needed = ["ranks", "parameters", "architecture", "format"]
    if _is_size(found) and found >= 4:
        needed.append("identity")
    for key in needed:
        if key not in values:
            raise ModelLoadError(f"The quantization_config in config.json lacks {key!r}. {_WHAT_NEXT}")


def _check_names(values: Mapping[str, Any]) -> None:
    for count in COUNTS:
        if count not in values["parameters"]:
            raise ModelLoadError(f"quantization_config.parameters lacks {count!r}. {_WHAT_NEXT}")
    for leader, others in values.get("shared", {}).items():
        for name in (leader, *others):
            if name not in values["ranks"]:
                raise ModelLoadError(f"quantization_config.shared names {name!r}, which has no rank. {_WHAT_NEXT}")


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


def _are_embeddings(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_name(name) and (_is_size(entry) or _is_in_bands(entry)) for name, entry in value.items()
    )


def _is_in_bands(entry: object) -> bool:
    if not isinstance(entry, Mapping) or entry.keys() != {"rows", "ranks"}:
        return False
    rows, ranks = entry["rows"], entry["ranks"]
    lists = isinstance(rows, Sequence) and isinstance(ranks, Sequence) and 0 < len(rows) == len(ranks)
    return lists and all(map(_is_size, rows)) and all(rank is None or _is_size(rank) for rank in ranks)


def _are_groups(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_name(leader) and isinstance(others, Sequence) and not isinstance(others, str) and all(map(_is_name, others))
        for leader, others in value.items()
    )


def _are_stacks(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_name(name)
        and isinstance(entry, Mapping)
        and entry.keys() == {"rank", "shared"}
        and _is_size(entry["rank"])
        and entry["shared"] in ("", "reduce", "expand")
        for name, entry in value.items()
    )


def _is_identity(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-7][0-9a-f]{15}", value) is not None


def _is_method(value: object) -> bool:
    return isinstance(value, dict) and _is_name(value.get("quant_method")) and value["quant_method"] != METHOD


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (_is_size, "a number from 1 on"),
    "ranks": (_are_sizes, "names of linears with their ranks, from 1 on"),
    "embeddings": (_are_embeddings, "names of embeddings with their ranks, from 1 on, or their bands' rows and ranks"),
    "dropped": (_are_counts, "names of layers with what they returned, from 0 on"),
    "shared": (_are_groups, "names of linears with lists of other linears"),
    "experts": (_are_stacks, "names of experts' stacks, each with a rank from 1 on and what is shared"),
    "parameters": (_are_counts, f"{', '.join(COUNTS)} with numbers from 0 on"),
    "architecture": (_is_name, "the name of a model's class"),
    "identity": (_is_identity, "sixteen hexadecimal digits, the first below 8"),
    "quantization": (_is_method, "the quantization_config of another method"),
    "quant_method": (_is_name, f"{METHOD!r}"),
}
"""Key -> whether a value may stand there, and what may."""
