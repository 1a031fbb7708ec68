"""Tells transformers how a student is loaded. Importing this module is all that it takes.

The quantizer of method "makd" is a `PlainStudentLoader`; that of a student whose factors another method quantizes is a
loader of `quantized`, which is a quantizer of that method, too.
"""

from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from makd.errors import ModelLoadError
from makd.student.config import METHOD, StudentConfig
from makd.student.hub import PlainStudentLoader
from makd.student.quantized import loader_for


@register_quantizer(METHOD)
class RegisteredLoader(HfQuantizer):
    """What transformers calls for a student, to get the loader that fits its config."""

    def __new__(cls, config: StudentConfig, **_: Any) -> HfQuantizer:  # type: ignore[misc]
        """A plain student's loader, or one that quantizes, too."""
        if config.asked is None and config.quantization is None:
            return PlainStudentLoader(config)
        return loader_for(config)


_merge = AutoHfQuantizer.merge_quantization_configs
"""transformers' own answer to which of two configs holds: that of the files and that of `from_pretrained`."""


def merge_quantization_configs(
    quantization_config: dict[str, Any] | QuantizationConfigMixin,
    quantization_config_from_args: QuantizationConfigMixin | None,
) -> QuantizationConfigMixin:
    """For a student's files both hold: one says where its factors are, the other how they shall be quantized.

    transformers has no registration for this and would refuse any two of different classes. All that are not of a
    student it answers itself.

    Raises:
        ModelLoadError: the files are quantized in another way.
    """
    asked = quantization_config_from_args
    method = getattr(quantization_config, "quant_method", None)
    if isinstance(quantization_config, dict):
        method = quantization_config.get("quant_method")
    if asked is None or isinstance(asked, StudentConfig) or method != METHOD:
        return _merge(quantization_config, asked)
    config = quantization_config
    if isinstance(config, dict):
        config = StudentConfig.from_dict(config)
    assert isinstance(config, StudentConfig)
    if config.quantization is None:
        config.asked = asked
    elif config.quantization.to_dict() != asked.to_dict():
        raise ModelLoadError(
            f"The files of this student are quantized already, with {config.quantization.to_dict()}; it cannot be "
            f"loaded with {asked.to_dict()}. Leave out `quantization_config`, or load the student that it was made "
            "from."
        )
    return config


AutoHfQuantizer.merge_quantization_configs = merge_quantization_configs
