"""Station 10: a model as files that other runtimes open, each compared with the model before it is let go.

    a model -> `examples` of its inputs -> `onnx_files`, `program`, `dense` or `gguf`: a file
    -> `agreement` with the model

Works on any model of transformers, students and teachers alike. Needs the extra `export`.
"""

from makd.export.agreement import Agreement
from makd.export.dense import save_dense
from makd.export.examples import input_names
from makd.export.gguf import save_gguf
from makd.export.onnx_files import save_onnx
from makd.export.onnx_session import OnnxSession
from makd.export.program import save_program
from makd.export.settings import FORMATS, ExportConfig

__all__ = [
    "FORMATS",
    "Agreement",
    "ExportConfig",
    "OnnxSession",
    "input_names",
    "save_dense",
    "save_gguf",
    "save_onnx",
    "save_program",
]
