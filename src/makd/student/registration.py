"""Tells transformers how a student is loaded. Importing this module is all that it takes.

The quantizer of method "makd" is a `PlainStudentLoader`; that of a student whose factors another method quantizes is a
loader of `quantized`, which is a quantizer of that method, too.
"""

from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

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
"""transformers' own answer to which of two configs holds: that of the files, or that given to `from_pretrained`."""


def merge_quantization_configs(
    quantization_config: dict[str, Any] | QuantizationConfigMixin,
    quantization_config_from_args: QuantizationConfigMixin | None,
) -> Any:
    """For a student's files both hold: one says where its factors are, the other how they shall be quantized.

    It stands in the place of transformers' own function, which refuses any two of different classes and asks none of
    them: nothing that can be registered hears of both. It answers for students alone; all others' answer is the same.
    """
    files, asked = quantization_config, quantization_config_from_args
    method = files.get("quant_method") if isinstance(files, dict) else files.quant_method
    if method != METHOD:
        return _merge(files, asked)
    config = StudentConfig.from_dict(files) if isinstance(files, dict) else files
    assert isinstance(config, StudentConfig)
    return config if asked is None or isinstance(asked, StudentConfig) else config.to_be_quantized(asked)


AutoHfQuantizer.merge_quantization_configs = merge_quantization_configs  # type: ignore[method-assign]
