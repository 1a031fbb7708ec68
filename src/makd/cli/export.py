"""The command `makd export`: its flags are the parameters of `export` below."""

from makd import exporting
from makd.cli.outcome import Outcome
from makd.export import ExportConfig
from makd.progress import OnProgress, reporting


def export(
    on_progress: OnProgress,
    student: str,
    to: str,
    output: str,
    quantize: str = "none",
    tolerance: float = 1e-4,
    llama_cpp: str | None = None,
    gguf_type: str = "f16",
    head: str = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Write a student as files that other runtimes open, after they were compared with it.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        student: folder or hub id, of a student or any other model.
        to: onnx, dense, torch or gguf.
        output: folder for the files.
        quantize: none or int8; of onnx alone.
        tolerance: how far an output may be from the student's, in units of the largest one where that is above 1.
        llama_cpp: folder of llama.cpp's sources, whose converter writes a gguf.
        gguf_type: numbers of a gguf: f32, f16, bf16 or q8_0.
        head: with which head it is loaded: auto, base, masked_lm, causal_lm, ...
        overwrite: replace the output folder when all is done.
    """
    settings = ExportConfig(to=to, quantize=quantize, tolerance=tolerance, llama_cpp=llama_cpp, gguf_type=gguf_type)
    with reporting("export", on_progress):
        report = exporting.export(student, settings, output, head=head, overwrite=overwrite)
    shown = [f"written: {report.folder / name} ({size / 1e6:,.1f} MB)" for name, size in report.bytes.items()]
    if report.agreement is None:
        shown.append("not compared with the student: transformers does not read such a file")
    else:
        shown.append(
            f"compared with the student on {report.agreement.rows} texts: largest difference of an output "
            f"{report.agreement.largest_difference:.1e}, relative error {report.agreement.relative_error:.1e}"
        )
    return Outcome({"folder": report.folder, "bytes": report.bytes, "agreement": report.agreement}, shown)
