"""Station 4: one forward each of teacher and student, and the tensors that plans ask for."""

from makd.capture.attention import AttentionCall
from makd.capture.recording import Recording, Tap, capture

__all__ = ["AttentionCall", "Recording", "Tap", "capture"]
