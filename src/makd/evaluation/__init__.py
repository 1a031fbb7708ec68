"""Station 8: how good a student is, and what it costs."""

from makd.evaluation.answers import Answers, answer
from makd.evaluation.costs import bytes_on_disk, latency, parameter_counts, stored_bytes
from makd.evaluation.fidelity import fidelity
from makd.evaluation.fingerprint import fingerprint
from makd.evaluation.instructions import InstructionsConfig
from makd.evaluation.perplexity import perplexity
from makd.evaluation.rolling import RollingPerplexity, rolling_perplexity

__all__ = [
    "Answers",
    "InstructionsConfig",
    "RollingPerplexity",
    "answer",
    "bytes_on_disk",
    "fidelity",
    "fingerprint",
    "latency",
    "parameter_counts",
    "perplexity",
    "rolling_perplexity",
    "stored_bytes",
]
