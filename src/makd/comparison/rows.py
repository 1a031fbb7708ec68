"""Station 10: what a comparison asks of rows, be they a task's with labels or text of a language model."""

from typing import Protocol, runtime_checkable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


@runtime_checkable
class Rows(Protocol):
    """Tokenized rows that students are taught on."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's, and its students'."""

    @property
    def distillation(self) -> Dataset:
        """All that a student may be taught on."""
