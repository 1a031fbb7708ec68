"""Station 3 for models larger than memory: from safetensors to safetensors, one matrix at a time."""

from makd.lowrank.stream.factorize import STREAMABLE, check_streamable, stream_student

__all__ = ["STREAMABLE", "check_streamable", "stream_student"]
