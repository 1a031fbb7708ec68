"""What `makd export` is asked for. Stands before all that write."""

from dataclasses import dataclass

from makd.errors import SettingError
from makd.registry import unknown_name

FORMATS = ("onnx", "dense", "torch", "gguf")
NUMBERS = ("f32", "f16", "bf16", "q8_0")
"""Of llama.cpp's converter."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written.

    Attributes:
        to: `onnx` (for ONNX Runtime and optimum), `dense` (an ordinary transformers model),
            `torch` (a torch.export program) or `gguf` (for llama.cpp).
        quantize: `none` or `int8`, of ONNX alone: weights as int8, a scale for each output channel; what they are
            multiplied with is rounded at run time.
        tolerance: how far an output may be from the model's, in float32, for the file to be let go: in units of the
            largest output where that is above 1. What is rounded (int8, a GGUF in other numbers than f32, a dense
            student that is stored so) is not held to it: how far it is, is told.
        llama_cpp: folder of llama.cpp's sources, whose converter writes the GGUF.
        gguf_type: numbers of the GGUF: f32, f16, bf16 or q8_0.
    """

    to: str
    quantize: str = "none"
    tolerance: float = 1e-4
    llama_cpp: str | None = None
    gguf_type: str = "f16"

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise unknown_name("format", self.to, FORMATS)
        if self.quantize not in ("none", "int8"):
            raise unknown_name("quantization", self.quantize, ("none", "int8"))
        if self.quantize != "none" and self.to != "onnx":
            raise SettingError(
                f"quantize is of ONNX files; got {self.quantize!r} with to={self.to!r}. Quantize a dense or torch "
                "model with torchao, a GGUF with gguf_type or llama.cpp's own tool."
            )
        if not 0 < self.tolerance < 1:
            raise SettingError(f"tolerance is above 0 and below 1; got {self.tolerance}.")
        if self.gguf_type not in NUMBERS:
            raise unknown_name("type of numbers", self.gguf_type, NUMBERS)
        if self.to == "gguf" and self.llama_cpp is None:
            raise SettingError(
                "A GGUF is written by llama.cpp's own converter, which no package carries: get llama.cpp's sources "
                "(git clone, or the source package of llama-cpp-python, folder vendor/llama.cpp) and name the folder "
                "that has convert_hf_to_gguf.py with llama_cpp."
            )
        if self.to != "gguf" and self.llama_cpp is not None:
            raise SettingError(f"llama_cpp is of GGUF files; got it with to={self.to!r}. Leave it out.")
        if self.to != "gguf" and self.gguf_type != ExportConfig.gguf_type:
            raise SettingError(f"gguf_type is of GGUF files; got {self.gguf_type!r} with to={self.to!r}. Leave it out.")
