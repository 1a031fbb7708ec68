"""Sentence encoders: what a sentence-transformers folder says about texts, pooling and embeddings.

Stands below the flow: every station that makes or compares embeddings asks here.
"""

from makd.sentence_encoder.companions import copy_companions
from makd.sentence_encoder.encoder import SentenceEncoder, encoder_of, read_sentence_encoder, read_text_settings
from makd.sentence_encoder.layout import Origin, find_folder, is_sentence_encoder, origin_of, transformer_path
from makd.sentence_encoder.pooling import AUTO, POOLINGS, check_pooling, pool
from makd.sentence_encoder.text import as_in_folder, default_prompt, shortest, with_prompt

__all__ = [
    "AUTO",
    "POOLINGS",
    "Origin",
    "SentenceEncoder",
    "as_in_folder",
    "check_pooling",
    "copy_companions",
    "default_prompt",
    "encoder_of",
    "find_folder",
    "is_sentence_encoder",
    "origin_of",
    "pool",
    "read_sentence_encoder",
    "read_text_settings",
    "shortest",
    "transformer_path",
    "with_prompt",
]
