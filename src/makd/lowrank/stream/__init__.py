"""Station 3 for models larger than memory: from safetensors to safetensors, one matrix at a time."""

from makd.lowrank.stream.factorize import STREAMABLE, check_streamable, stream_student
from makd.lowrank.stream.student import saved_tensors

__all__ = ["STREAMABLE", "check_streamable", "saved_tensors", "stream_student"]
