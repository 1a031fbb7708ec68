"""The command `makd inspect`: what a model's layers are made of."""

from makd import capture, loading
from makd.anatomy import inspection_content, to_table
from makd.cli.outcome import Outcome
from makd.progress import OnProgress, reporting


def inspect(on_progress: OnProgress, model: str, head: str = "auto") -> Outcome:
    """Show where a model keeps its layers and linears, their shapes, parameters and break-even ranks.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        model: hub id, folder, .gguf file, or package:module/path.
        head: auto, base, masked_lm, causal_lm, sequence_classification, ...
    """
    with reporting("load", on_progress):
        found = capture.inspect(loading.load_model(model, head))
    return Outcome(inspection_content(found), [to_table(found)])
