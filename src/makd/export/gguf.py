"""A student multiplied out as a GGUF file for llama.cpp, written by llama.cpp's own converter.

No package carries that converter in a form that can be called, so its sources are named by the user. What it wrote is
read back by transformers and compared with the student.
"""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from makd.errors import ExportError, SettingError
from makd.export.agreement import Agreement, check, compare_forwards
from makd.export.dense import save_dense
from makd.export.examples import forward_names
from makd.export.tracing import check_packages, evaluating

CONVERTER = "convert_hf_to_gguf.py"
LAST_LINES = 3


def find_converter(llama_cpp: str | Path) -> Path:
    """The converter among llama.cpp's sources.

    Raises:
        SettingError: it is not there, or a package that it or the comparison needs is not.
    """
    script = Path(llama_cpp).expanduser() / CONVERTER
    if not script.is_file():
        raise SettingError(f"llama_cpp is the folder of llama.cpp's sources; {llama_cpp} has no {CONVERTER}.")
    check_packages("A GGUF", ("gguf", "sentencepiece"), extra="gguf")
    return script


def save_gguf(
    model: PreTrainedModel,
    folder: str | Path,
    work: str | Path,
    *,
    llama_cpp: str | Path,
    numbers: str = "f16",
    tolerance: float = 1e-4,
) -> Agreement | None:
    """Write `model.gguf` into `folder`.

    Args:
        model: a student.
        folder: that is there.
        work: a folder with the tokenizer's files, for the dense model that the converter reads.
        llama_cpp: folder of llama.cpp's sources.
        numbers: f32, f16, bf16 or q8_0.
        tolerance: how far an output may be from the student's, in f32.

    Returns:
        How far the file's outputs are from the student's, if transformers reads such files; else None.

    Raises:
        ExportError: the converter does not know the architecture, or what it wrote differs in f32.
        SettingError: as `find_converter`.
    """
    script = find_converter(llama_cpp)
    dense, file = Path(work), Path(folder) / "model.gguf"
    save_dense(model, dense, tolerance=tolerance)
    call = [sys.executable, str(script), str(dense), "--outfile", str(file), "--outtype", numbers]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not file.is_file():
        told = " ".join(done.stderr.strip().splitlines()[-LAST_LINES:])
        raise ExportError(
            f"llama.cpp's converter refused the multiplied-out student: {told[:400]} If a package is missing, install "
            f"it; what it can convert: {sys.executable} {script} --print-supported-models."
        )
    agreement = _compare(model, file)
    if agreement is not None and numbers == "f32":
        check(agreement, tolerance, "GGUF")
    return agreement


def _compare(model: PreTrainedModel, file: Path) -> Agreement | None:
    try:
        again = type(model).from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    except (ValueError, NotImplementedError, KeyError):  # an architecture whose GGUFs transformers does not read
        return None
    with evaluating(model):
        return compare_forwards(again, model, forward_names(model))
