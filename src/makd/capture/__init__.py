"""Station 4: one forward each of teacher and student, and the tensors that plans ask for."""

from makd.capture.attention import AttentionCall
from makd.capture.recording import Kind, Receiver, Recording, Tap, capture
from makd.capture.trial import examine, inspect
from makd.capture.unlabelled import without_labels
from makd.capture.vocabulary import (
    HeadCall,
    VocabularyHead,
    has_vocabulary_head,
    label_shift_of,
    why_not_repeated,
    withhold_logits,
)

__all__ = [
    "AttentionCall",
    "HeadCall",
    "Kind",
    "Receiver",
    "Recording",
    "Tap",
    "VocabularyHead",
    "capture",
    "examine",
    "has_vocabulary_head",
    "inspect",
    "label_shift_of",
    "why_not_repeated",
    "withhold_logits",
    "without_labels",
]
