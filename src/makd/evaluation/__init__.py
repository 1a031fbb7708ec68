"""Station 8: how good a student is, and what it costs."""

from makd.evaluation.costs import bytes_on_disk, latency, parameter_counts, stored_bytes
from makd.evaluation.fidelity import fidelity
from makd.evaluation.fingerprint import fingerprint
from makd.evaluation.perplexity import perplexity

__all__ = ["bytes_on_disk", "fidelity", "fingerprint", "latency", "parameter_counts", "perplexity", "stored_bytes"]
